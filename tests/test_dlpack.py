"""`comask.runtime.dlpack` against torch's and numpy's DLPack: borrowing, sharing, and who frees what."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from comask.errors import ImageError
from comask.runtime import dlpack
from comask.runtime.dlpack import HostMemory, SharedArray, borrow


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float16])
def test_torch_tensors_are_borrowed(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).to(dtype).reshape(2, 3, 4)[:, :, ::2]
    borrowed = borrow(tensor)
    assert (borrowed.address, borrowed.shape) == (tensor.data_ptr(), (2, 3, 2))
    assert borrowed.strides == tuple(n * tensor.element_size() for n in tensor.stride())
    assert borrowed.device is None
    np.testing.assert_array_equal(np.asarray(borrowed), tensor.numpy())
    assert borrowed.dtype == tensor.numpy().dtype


class OldProducer:
    """Knows DLPack as it was before version 1.0."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, stream: int | None = None) -> object:
        return self.array.__dlpack__()


class NewProducer(OldProducer):
    """Gives versioned capsules."""

    def __dlpack__(  # type: ignore[override]
        self, *, stream: int | None = None, max_version: tuple[int, int] | None = None
    ) -> object:
        capsule = self.array.__dlpack__(max_version=max_version)
        assert "dltensor_versioned" in repr(capsule)
        return capsule


@pytest.mark.parametrize("producer", [OldProducer, NewProducer, lambda array: array])
def test_producers_of_any_age(producer: Any) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(4, 6)[::2, ::-1]
    borrowed = borrow(producer(array))
    assert borrowed.strides == array.strides
    np.testing.assert_array_equal(np.asarray(borrowed), array)


@pytest.mark.parametrize("producer", [OldProducer, NewProducer, lambda array: array])
def test_the_owner_lives_until_the_release(producer: Any) -> None:
    class Array(np.ndarray):
        """One that weak references can point to."""

    array = np.zeros(100, np.uint8).view(Array)
    gone = weakref.ref(array)
    borrowed = borrow(producer(array))
    view = np.asarray(borrowed)
    del array
    gc.collect()
    assert gone() is not None
    del view
    borrowed.release()
    gc.collect()
    assert gone() is None


def test_cuda_producers_are_told_our_stream() -> None:
    told: list[dict[str, Any]] = []

    class Producer(OldProducer):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 1

        def __dlpack__(self, **arguments: Any) -> object:  # type: ignore[override]
            told.append(arguments)
            return self.array.__dlpack__()

    borrowed = borrow(Producer(np.zeros(3, np.uint8)), 77)
    assert told == [{"max_version": (1, 0), "stream": 77}]
    assert borrowed.device == 1
    assert not hasattr(borrowed, "__array_interface__")


def test_cuda_array_interface() -> None:
    interface = {"shape": (4, 5, 3), "typestr": "|u1", "data": (4096, True), "version": 3}
    source = SimpleNamespace(
        __cuda_array_interface__=interface | {"stream": 9}, device=SimpleNamespace(id=0)
    )
    borrowed = borrow(source, 5)
    assert (borrowed.address, borrowed.strides, borrowed.device) == (4096, (15, 3, 1), 0)
    assert borrowed.stream == 9  # for us to wait for
    assert borrow(source).stream is None
    source = SimpleNamespace(
        __cuda_array_interface__=interface | {"strides": (32, 3, 1)}, device=SimpleNamespace(id=2)
    )
    borrowed = borrow(source)
    assert (borrowed.strides, borrowed.device, borrowed.stream) == ((32, 3, 1), 2, None)


def test_memory_of_no_gpu_is_refused() -> None:
    interface = {"shape": (4, 5, 3), "typestr": "|u1", "data": (4096, True), "version": 3}
    with pytest.raises(ImageError, match=r"lies at 0x1000, which CUDA.s driver does not know"):
        borrow(SimpleNamespace(__cuda_array_interface__=interface))


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(ImageError, match="a frame is a list"):
        borrow([[1, 2], [3, 4]])
    with pytest.raises(ImageError, match="expected integers or floats"):
        borrow(torch.zeros(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float32])
def test_ours_are_read_by_others(dtype: Any) -> None:
    array = np.arange(24).astype(dtype).reshape(2, 3, 4)
    shared = HostMemory({"values": array}).shared()["values"]
    for read in (torch.from_dlpack, np.from_dlpack):
        other = read(shared)
        np.testing.assert_array_equal(np.asarray(other), array)
    assert torch.from_dlpack(shared).data_ptr() == array.ctypes.data
    kept = shared.copy()
    array[...] = 0
    assert torch.from_dlpack(kept).sum() > 0
    assert not torch.from_dlpack(shared).any()
    with pytest.raises(BufferError):
        shared.__dlpack__(copy=True)
    assert not hasattr(shared, "__cuda_array_interface__")


def test_nothing_stays_behind() -> None:
    """By a consumer, by a capsule that nobody takes, and by our own consumer."""
    gc.collect()
    before = len(dlpack._exported)
    memory = HostMemory({"values": np.arange(6)})
    gone = weakref.ref(memory)
    shared = memory.shared()["values"]
    tensors = [torch.from_dlpack(shared) for _ in range(100)]
    capsules = [shared.__dlpack__() for _ in range(100)]
    arrays = [np.asarray(borrow(shared)) for _ in range(100)]
    assert len(dlpack._exported) == before + 300
    del shared, memory
    gc.collect()
    assert gone() is not None
    assert int(tensors[5].sum()) == int(arrays[5].sum()) == 15
    del tensors, capsules, arrays
    gc.collect()
    assert len(dlpack._exported) == before
    assert gone() is None


def test_consumers_streams_are_ordered() -> None:
    asked: list[int | None] = []

    class Owner:
        def share(self, stream: int | None) -> int | None:
            asked.append(stream)
            return 42

        def copy(self, array: SharedArray) -> SharedArray:
            raise NotImplementedError

    shared = SharedArray(256, (2, 3), np.dtype(np.float32), 3, Owner())
    assert shared.__dlpack_device__() == (2, 3)
    for stream in (None, -1, 2, 1234):
        shared.__dlpack__(stream=stream)
    assert asked == [1, 2, 1234]
    interface = shared.__cuda_array_interface__
    assert asked.pop() is None
    assert (interface["data"], interface["stream"], interface["typestr"]) == (
        (256, False),
        42,
        "<f4",
    )


def test_numpy_takes_ours_from_the_host_alone() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    shared = HostMemory({"a": values}).shared()["a"]
    found = np.asarray(shared)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    np.testing.assert_array_equal(found, values)
    assert found.ctypes.data == shared.address  # not copied
    assert np.array(shared).ctypes.data != shared.address
    assert np.asarray(shared, dtype=np.int64).tolist() == [[0, 1, 2], [3, 4, 5]]
    on_gpu = SharedArray(shared.address, (2, 3), values.dtype, 1, HostMemory({}))
    with pytest.raises(TypeError, match="this memory is on GPU 1, which numpy cannot read"):
        np.asarray(on_gpu)
