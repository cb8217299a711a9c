"""Checks `comask.runtime.device` on pycuda: memory, copies, streams, events, graphs and threads."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from context import Context
from in_threads import in_threads
from kernel_values import TORCH
from rows import RUNS, Check, Figure

MIB = 2**20
LONG = 64  # copies of a large block: milliseconds of work on any GPU


def opens(context: Context) -> Figure:
    """Opens the GPU's primary context with pycuda."""
    from comask.runtime.device import open_device

    start = time.perf_counter()
    with open_device() as device, _freed(device.stream()) as stream:
        stream.synchronize()
    return Figure(value=time.perf_counter() - start, unit="s")


def copies(context: Context) -> Figure:
    """Copies bytes to the GPU, over the GPU at an offset, and back, through page-locked memory."""
    from comask.runtime.device import open_device

    size = MIB + 123
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    result = np.zeros(size + 77, np.uint8)
    with (
        open_device() as device,
        _freed(device.stream()) as stream,
        _freed(device.memory(size), device.memory(2 * size), device.pinned(size)) as parts,
    ):
        first, second, staged = parts
        staged.bytes[:] = data
        stream.copy_in(first, staged.bytes)
        stream.copy_over(second, first.address, offset=77, size=size)
        stream.copy_out(result, second)
        stream.synchronize()
    return Figure(value=float((result[77:] != data).sum()), unit=f"of {size} bytes", most=0)


def streams_wait(context: Context) -> Figure:
    """Reads behind another stream's long work that writes last; and, as a control, without waiting."""
    from comask.runtime.device import open_device

    values, block = [], (8 if context.rehearsal else 256) * MIB
    with (
        open_device() as device,
        _freed(device.stream(), device.stream()) as (writer, reader),
        _freed(device.memory(block), device.memory(block), device.memory(256)) as memory,
        _freed(*(device.pinned(256) for _ in range(3))) as pinned,
    ):
        zeros, ones, result = (part.bytes for part in pinned)
        zeros[:], ones[:] = 0, 1
        for waits in (True, False):
            writer.copy_in(memory[2], zeros)
            writer.synchronize()
            _work(writer, memory[0], memory[1])
            writer.copy_in(memory[2], ones)
            if waits:
                reader.wait_for(writer.handle)
            reader.copy_out(result, memory[2])
            reader.synchronize()
            values.append(int(result[0]))
            writer.synchronize()
    control = "written" if values[1] else "not written"
    note = f"as a control, without waiting, it was {control} yet"
    return Figure(value=float(values[0]), unit="must be 1", least=1, most=1, note=note)


def events_tell(context: Context) -> Figure:
    """Asks an event for long work before and after it is done, and takes the time between two."""
    from comask.runtime.device import open_device

    block = (1 if context.rehearsal else 256) * MIB
    with open_device() as device, _freed(device.stream()) as stream:
        events = device.event(timed=True), device.event(timed=True)
        with _freed(device.memory(block), device.memory(block)) as memory, _freed(*events):
            start = time.perf_counter()
            events[0].record(stream)
            _work(stream, *memory)
            events[1].record(stream)
            early = events[1].past()
            events[1].synchronize()
            wall = time.perf_counter() - start
            late, between = events[1].past(), events[1].since(events[0])
    if early or not late:
        raise RuntimeError(
            f"an event is past={early} before its work is done and past={late} after it"
        )
    # the stand-in's clock counts tasks
    most = None if context.rehearsal else 1.1
    note = f"{1e3 * between:.2f} ms between the events"
    return Figure(value=between / wall, unit="of the wall time", least=0.0, most=most, note=note)


def graphs_replay(context: Context) -> Figure:
    """Captures copies and a kernel as a graph, and replays it on other data."""
    from comask.errors import EngineError
    from comask.kernels import run
    from comask.kernels.launch import FRAME, rgb_to_canvas_launch
    from comask.runtime.device import open_device

    size, canvas = (77, 103), (96, 128)
    launch = rgb_to_canvas_launch(size, (3 * size[1], 3, 1), canvas, canvas)
    sizes, rng, wrong = (
        (3 * size[0] * size[1], 3 * canvas[0] * canvas[1]),
        np.random.default_rng(1),
        0,
    )
    with open_device() as device, _freed(device.stream()) as stream:
        run.prepare(FRAME)
        with (
            _freed(*map(device.memory, sizes)) as memory,
            _freed(*map(device.pinned, sizes)) as host,
        ):

            def queue() -> None:
                stream.copy_in(memory[0], host[0].bytes)
                run.on_gpu(launch, [memory[0].address], memory[1].address, stream.handle)
                stream.copy_out(host[1].bytes, memory[1])

            with _freed(stream.capture(queue)) as graph:
                for _ in range(3):
                    host[0].bytes[:] = rng.integers(0, 256, sizes[0], dtype=np.uint8)
                    graph.launch(stream)
                    stream.synchronize()
                    expected = np.zeros(sizes[1], np.uint8)
                    run.on_host(launch, [host[0].bytes.ctypes.data], expected.ctypes.data)
                    wrong += int((host[1].bytes != expected).sum())
            try:
                stream.capture(stream.synchronize)  # is not allowed
            except EngineError:
                queue()
                stream.synchronize()  # and leaves the stream as it was
            else:
                raise RuntimeError("a capture that synchronises did not fail")
    return Figure(value=float(wrong), unit="bytes of three replays", most=0)


def threads_share(context: Context) -> Figure:
    """Makes, uses and hands over memory and streams in four threads; a fifth frees all of it."""
    from comask.runtime.device import open_device

    handed_over: list[Any] = []
    device = open_device()

    def use(place: int) -> None:
        for _ in range(25):
            with device, device:  # nested
                memory, stream = device.memory(4096), device.stream()
                source, result = np.full(4096, place, np.uint8), np.zeros(4096, np.uint8)
                stream.copy_in(memory, source)
                stream.copy_out(result, memory)
                stream.synchronize()
                if not (result == place).all():
                    raise RuntimeError("a copy got another thread's bytes")
                handed_over.extend([memory, stream])

    def free(_: int) -> None:
        with device:
            for part in handed_over:
                _free(part)

    if errors := in_threads(4, use) + in_threads(1, free):
        raise errors[0]
    return Figure(value=float(len(handed_over)), unit="objects", least=200)


def memory_returns(context: Context) -> Figure:
    """Compares the GPU's free memory before and after blocks were allocated and freed."""
    from comask.runtime.device import open_device

    with open_device() as device, _freed(device.stream()):
        _free(device.memory(MIB))  # what the driver keeps from the first time on
        before = free_memory()
        for _ in range(20):
            with _freed(device.memory(16 * MIB)):
                pass
        lost = before - free_memory()
    return Figure(value=lost / MIB, unit="MiB", most=2)  # a driver's smallest unit


def full_memory(context: Context) -> Figure:
    """Asks for more memory than the GPU has; the error must be ours, and the GPU usable afterwards."""
    from comask.errors import EngineError
    from comask.runtime.device import open_device
    from comask.runtime.gpu import find_gpu

    gpu = find_gpu()
    assert gpu is not None
    if context.rehearsal:
        os.environ["STANDIN_MEMORY"] = str(gpu.memory)
    with open_device() as device:
        try:
            device.memory(2 * gpu.memory)
        except EngineError as error:
            note = str(error)
        else:
            raise RuntimeError("twice the GPU's memory was allocated")
        _free(device.memory(MIB))
    return Figure(value=1.0, note=note)


def foreign_stream(context: Context) -> Figure:
    """Orders our stream with one of torch's, in both directions."""
    import torch

    from comask.runtime.device import open_device

    theirs = torch.cuda.Stream()
    with open_device() as device, _freed(device.stream(), device.event()) as (stream, event):
        with torch.cuda.stream(theirs):
            large = torch.ones(8192, 8192, device="cuda")
            for _ in range(8):
                large = large @ large / 8192
            tensor = large.sum()[None] / 8192**2
        stream.wait_for(theirs.cuda_stream)
        with _freed(device.memory(4)) as memory:
            stream.copy_over(memory, tensor.data_ptr())
            result = np.zeros(1, np.float32)
            stream.copy_out(result, memory)
            event.record(stream)
            event.hold_back(theirs.cuda_stream)
            with torch.cuda.stream(theirs):
                tensor.fill_(7.0)  # which we must not see
            stream.synchronize()
            theirs.synchronize()
    return Figure(value=abs(float(result[0]) - 1), most=1e-3)


def free_memory() -> int:
    """Returns the GPU's free memory in bytes; a context must be current."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    status = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    if status:
        raise RuntimeError(f"cuMemGetInfo failed with {status}")
    return free.value


@dataclass
class Allocations:
    """Blocks of GPU and page-locked memory.

    Attributes:
        made: how many were allocated.
        live: those of them that are not freed, by identity.
    """

    made: int = 0
    live: dict[int, Any] = field(default_factory=dict)


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Counts the blocks that are allocated in this block."""
    from comask.runtime.device import Device, DeviceMemory, PinnedMemory

    found = Allocations()

    def making(allocate: Any) -> Any:
        def made(self: Device, size: int) -> Any:
            memory = allocate(self, size)
            found.made += 1
            found.live[id(memory)] = memory
            return memory

        return made

    def freeing(free: Any) -> Any:
        def freed(self: Any) -> None:
            free(self)
            found.live.pop(id(self), None)

        return freed

    with ExitStack() as stack:
        for owner, name, wrapped in (
            (Device, "memory", making), (Device, "pinned", making),
            (DeviceMemory, "free", freeing), (PinnedMemory, "free", freeing),
        ):  # fmt: skip
            replacement = wrapped(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield found


@contextmanager
def _freed(*parts: Any) -> Iterator[Any]:
    """Yields the parts, or the only one, and frees them at the end."""
    try:
        yield parts if len(parts) > 1 else parts[0]
    finally:
        for part in parts:
            _free(part)


def _free(part: Any) -> None:
    free: Callable[[], None] = getattr(part, "free", None) or part.close
    free()


def _work(stream: Any, first: Any, second: Any) -> None:
    for _ in range(LONG):
        stream.copy_over(first, second.address)


def checks() -> list[Check]:
    """Returns the rows of the group."""
    bytes_ = "the bytes that were written"
    return [
        Check(
            name="pycuda opens the GPU", run=opens, compared=RUNS, provides="device",
            fails="pycuda, built elsewhere, does not fit this driver", needs=("GPU", "pycuda"),
        ),
        Check(
            name="copies to the GPU, over it and back", run=copies, needs=("device",), compared=bytes_,
            fails="an offset or a size is wrong",
        ),
        Check(
            name="a stream waits for another", run=streams_wait, needs=("device",), compared=bytes_,
            fails="the reading stream does not wait for the writing one",
        ),
        Check(
            name="events tell when work is done", run=events_tell, needs=("device",),
            compared="the wall time of the same work",
            fails="an event is past before its work is done, or measures more than the wall time",
        ),
        Check(
            name="CUDA graphs of copies and a kernel", run=graphs_replay,
            needs=("device", "kernels", "C++ compiler"), compared="the kernel's CPU build on each input",
            fails="a replay computes on old data, or a forbidden capture spoils the stream",
        ),
        Check(
            name="threads share a device", run=threads_share, needs=("device",), compared=bytes_,
            fails="an object cannot be freed in another thread, or bytes are mixed up", limit=20,
        ),
        Check(
            name="freed memory returns to the GPU", run=memory_returns, needs=("device",),
            compared="the free memory before", fails="any of it stays allocated",
        ),
        Check(
            name="a full GPU is an error and no end", run=full_memory, needs=("device",), compared=RUNS,
            fails="the error is not ours, or the context is lost",
        ),
        Check(
            name="our stream and torch's wait for each other", run=foreign_stream,
            needs=("device", TORCH, "real GPU"), compared="the value between two writes of torch",
            fails="torch and pycuda are in different contexts, or a wait has no effect",
        ),
    ]  # fmt: skip
