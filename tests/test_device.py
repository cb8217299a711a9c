"""`comask.runtime.device` on real pycuda over a stand-in driver: copies, order, threads, frees."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
from in_threads import in_threads
from standin import counts, live, run_on_standin, skip_without_pycuda

from comask.errors import BackendUnavailableError, EngineError
from comask.runtime.device import Device, open_device

skip_without_pycuda()


def copy_there_and_back() -> None:
    device = open_device()
    assert open_device(0) is device
    data = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    with device:
        memory, staged, stream = device.memory(4096), device.pinned(1000), device.stream()
        assert memory.address % 256 == 0
        assert stream.handle > 0
        staged.bytes[:] = data
        stream.copy_in(memory, staged.bytes)
        result = np.zeros(1000, np.uint8)
        stream.copy_out(result, memory)
        assert not result.any()  # both still wait
        stream.synchronize()
        np.testing.assert_array_equal(result, data)
        expected = {"device_live": 1, "device_bytes": 4096, "host_live": 1, "streams_live": 1}
        assert live() == expected | {"events_live": 2, "contexts_current": 1}
        memory.free()
        staged.free()
        stream.close()
        assert staged.bytes.size == 0
    assert live() == {}
    assert counts().contexts_retained == 1


def order_streams() -> None:
    driver = ctypes.CDLL("libcuda.so.1")
    device = open_device()
    with device:
        memory, stream = device.memory(8), device.stream()
        foreign = ctypes.c_void_p()
        assert driver.cuStreamCreate(ctypes.byref(foreign), 1) == 0
        first, second, third = (np.full(8, value, np.uint8) for value in (1, 2, 3))

        def foreign_copy(array: np.ndarray) -> None:
            arguments = (memory.address, array.ctypes.data, 8)
            copied = driver.cuMemcpyHtoDAsync_v2(*map(ctypes.c_size_t, arguments), foreign)
            assert copied == 0

        result = np.zeros(8, np.uint8)
        foreign_copy(first)
        stream.wait_for(foreign.value)
        foreign_copy(second)  # after what is waited for
        stream.copy_out(result, memory)
        stream.synchronize()
        assert (result == 1).all()
        assert driver.cuStreamSynchronize(foreign) == 0

        stream.copy_in(memory, third)
        event = device.event()
        event.record(stream)
        event.hold_back(foreign.value)
        written = ctypes.create_string_buffer(8)
        arguments = (ctypes.addressof(written), memory.address, 8)
        assert driver.cuMemcpyDtoHAsync_v2(*map(ctypes.c_size_t, arguments), foreign) == 0
        assert driver.cuStreamSynchronize(foreign) == 0
        assert written.raw == b"\3" * 8
        for refused in (stream.wait_for, event.hold_back, device.synchronize):
            with pytest.raises(EngineError, match=r"CUDA stream 0xdead .* failed with 400.*exists"):
                refused(0xDEAD)
        foreign_copy(first)
        device.synchronize(foreign.value)
        assert ctypes.string_at(memory.address, 8) == first.tobytes()
        event.close()
        assert driver.cuStreamDestroy_v2(foreign) == 0
        stream.close()
        memory.free()
    assert live() == {}


def use_from_threads() -> None:
    """Made in one thread, used and freed in others that end, nested and with exceptions."""
    device = open_device()

    def use(place: int) -> None:
        for _ in range(20):
            with open_device(), device:  # nested
                memory, stream = device.memory(64), device.stream()
                source = np.full(64, place, np.uint8)
                result = np.zeros_like(source)
                stream.copy_in(memory, source)
                stream.copy_out(result, memory)
                stream.synchronize()
                assert (result == place).all()
                handed_over.append((memory, stream))
                with pytest.raises(ZeroDivisionError), device:
                    1 / 0  # noqa: B018

    handed_over: list[tuple] = []
    assert in_threads(4, use) == []
    assert counts().contexts_current == 0
    assert len(handed_over) == 80

    def free() -> None:
        with device:
            while handed_over:
                memory, stream = handed_over.pop()
                stream.close()
                memory.free()

    thread = threading.Thread(target=free)
    thread.start()
    thread.join()
    assert live() == {}
    assert counts().contexts_retained == 1


def capture_and_replay() -> None:
    device = open_device()
    with device:
        memory, stream, event = device.memory(8), device.stream(), device.event()
        assert event.past()
        source, result = np.ones(8, np.uint8), np.zeros(8, np.uint8)

        def queue() -> None:
            stream.copy_in(memory, source)
            stream.copy_out(result, memory)

        graph = stream.capture(queue)
        stream.synchronize()
        assert not result.any()  # captured only
        for value in (5, 6):
            source[:] = value
            graph.launch(stream)
            event.record(stream)
            assert not event.past()
            event.synchronize()
            assert event.past()
            assert (result == value).all()
        assert counts().graph_launches == 2

        def fail() -> None:
            queue()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            stream.capture(fail)
        with pytest.raises(EngineError, match="start a new process"):
            stream.capture(stream.synchronize)
        queue()
        stream.synchronize()  # no capture goes on
        assert live()["graphs_live"] == 1
        graph.close()
        event.close()
        stream.close()
        memory.free()
    assert live() == {}


def run_out_of_memory() -> None:
    device = open_device()
    with device:
        memory = device.memory(1 << 20)
        with pytest.raises(EngineError, match=r"GPU 0: .* 2 MiB more; .* max_batch \(--batch\)"):
            device.memory(2 << 20)
        memory.free()
        device.memory(2 << 20).free()
    assert live() == {}
    with pytest.raises(BackendUnavailableError, match="GPU 3 cannot be opened"):
        open_device(3)


@pytest.mark.parametrize(
    "function",
    [copy_there_and_back, order_streams, use_from_threads, capture_and_replay],
    ids=lambda f: f.__name__,
)
def test_on_the_standin(function) -> None:
    run_on_standin(function)


def test_a_full_gpu_is_one_line() -> None:
    run_on_standin(run_out_of_memory, STANDIN_MEMORY=str(2 << 20))


def test_without_a_driver_it_says_so() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(BackendUnavailableError, match=r"libcuda\.so\.1.*comask\[gpu\]"):
            Device(0)
    else:
        pytest.skip("there is a driver")
