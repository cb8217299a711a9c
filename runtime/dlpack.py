"""Memory shared with other libraries without copies: DLPack and `__cuda_array_interface__`, both ways.

`borrow` reads what others hold; `SharedArray` shows them what we hold. DLPack's structures and rules are
those of dlpack.h 1.0 and of the Python array API's `__dlpack__`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from comask.errors import ImageError
from comask.runtime.device import gpu_at

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
KINDS = "iuf"  # DLDataTypeCode 0..2, as numpy calls them
UNORDERED = -1  # the stream of a consumer that takes care of the order itself


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class _Managed(ctypes.Structure):
    _fields_ = [
        ("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]  # fmt: skip


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _Tensor),
    ]  # fmt: skip


def _capi(name: str, result: Any, *arguments: Any) -> Any:
    # prototypes of our own: those of ctypes.pythonapi belong to everybody
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_Name = ctypes.c_char_p
_capsule_pointer = _capi("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, _Name)
_capsule_is_valid = _capi("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, _Name)
_new_capsule = _capi(
    "PyCapsule_New", ctypes.py_object, ctypes.c_void_p, _Name, ctypes.c_void_p
)  # fmt: skip
# a dying capsule comes by address: a reference to it would bring it back to life
_dying_is_valid = _capi("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, _Name)
_dying_pointer = _capi("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, _Name)


class Borrowed:
    """Somebody's memory, theirs to free once `release` was called or this object is collected.

    Attributes:
        address: of element 0.
        shape: in elements.
        strides: in bytes.
        dtype: of an element.
        device: index of the GPU; None for the host's memory.
        stream: handle of the producer's stream that its data are ready on, where it is ours to wait
            for; else None.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        dtype: np.dtype[Any],
        device: int | None,
        owner: object,
        stream: int | None = None,
    ) -> None:
        self.address, self.shape, self.dtype, self.device = address, shape, dtype, device
        self.strides = _packed(shape, dtype) if strides is None else strides
        self.stream = stream
        self._owner: object = owner

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """For `numpy.asarray`, which keeps this object, and so the memory."""
        if self.device is not None:
            raise AttributeError("memory of a GPU is no array of numpy's")
        return {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "strides": self.strides,
            "data": (self.address, False),
        }  # fmt: skip

    def view(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Borrowed:
        """A part of the same memory, which keeps all of it until it is released as well.

        Args:
            offset: of its element 0, in bytes.
            shape: in elements.
            strides: in bytes.
        """
        return Borrowed(
            self.address + offset, shape, strides, self.dtype, self.device, self._owner, self.stream
        )

    def release(self) -> None:
        """Lets go of it; nothing may be reading it any more."""
        self._owner = None


def borrow(source: Any, stream: int = UNORDERED) -> Borrowed:
    """The memory behind an array of another library.

    Args:
        source: has `__dlpack__`, `__cuda_array_interface__`, or is a numpy array.
        stream: handle of our stream, which a CUDA producer makes wait for its work; `UNORDERED` when
            the order is seen to otherwise.

    Raises:
        ImageError: it has neither, or its layout is none that can be borrowed.
    """
    if isinstance(source, np.ndarray):  # as read-only ones have no DLPack in older versions
        return Borrowed(
            source.ctypes.data, source.shape, source.strides, source.dtype, None, source
        )
    if hasattr(source, "__dlpack__"):
        return _from_dlpack(source, stream)
    if hasattr(source, "__cuda_array_interface__"):
        return _from_cuda_array_interface(source, ordered=stream == UNORDERED)
    raise ImageError(
        f"a frame is a {type(source).__name__}; expected an object with __dlpack__ or "
        "__cuda_array_interface__, or a numpy array"
    )


def _from_dlpack(source: Any, stream: int) -> Borrowed:
    kind, index = map(int, source.__dlpack_device__())
    if kind not in (CPU, CUDA, CUDA_HOST, CUDA_MANAGED):
        raise ImageError(
            f"a frame is on DLPack device {kind}; expected CUDA's or the host's memory"
        )
    arguments = {"stream": stream} if kind in (CUDA, CUDA_MANAGED) else {}
    try:
        capsule = source.__dlpack__(max_version=(1, 0), **arguments)
    except TypeError:  # older than DLPack 1.0
        capsule = source.__dlpack__(**arguments)
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise ImageError(f"a frame comes by DLPack {versioned.major}; expected version 1")
        tensor = versioned.tensor
    else:
        tensor = _Managed.from_address(_capsule_pointer(capsule, b"dltensor")).tensor
    if tensor.code >= len(KINDS) or tensor.lanes != 1 or tensor.bits % 8:
        raise ImageError(f"a frame has DLPack type {tensor.code}; expected integers or floats")
    dtype = np.dtype(f"{KINDS[tensor.code]}{tensor.bits // 8}")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = None
    if tensor.strides:
        strides = tuple(dtype.itemsize * n for n in tensor.strides[: tensor.ndim])
    device = index if kind in (CUDA, CUDA_MANAGED) else None
    # the capsule keeps its name: then it frees the tensor when its last reference goes
    return Borrowed(
        (tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, device, capsule
    )  # fmt: skip


def _from_cuda_array_interface(source: Any, *, ordered: bool) -> Borrowed:
    found: Mapping[str, Any] = source.__cuda_array_interface__
    if found.get("mask") is not None:
        raise ImageError("a frame has a mask in its __cuda_array_interface__; expected none")
    strides, address = found.get("strides"), int(found["data"][0])
    # the interface itself does not say; cupy's arrays do
    index = getattr(getattr(source, "device", None), "id", None)
    if index is None and (index := gpu_at(address)) is None:
        raise ImageError(
            f"a frame with __cuda_array_interface__ lies at {address:#x}, which is no GPU's memory that "
            "CUDA's driver knows"
        )
    return Borrowed(
        address,
        tuple(found["shape"]),
        None if strides is None else tuple(strides),
        np.dtype(found["typestr"]),
        int(index),
        source,
        None if ordered else found.get("stream"),
    )


class Owner(Protocol):
    """Whoever holds a `SharedArray`'s memory."""

    def share(self, stream: int | None) -> int | None:
        """Makes a consumer's stream wait until the memory is written.

        Args:
            stream: its handle; None for a consumer that will wait for our stream by itself.

        Returns:
            handle of our stream, None on the host.

        Raises:
            RuntimeError: the memory holds something else by now.
        """

    def copy(self, array: SharedArray) -> SharedArray:
        """See `SharedArray.copy`."""


class SharedArray:
    """C-contiguous memory of ours that other libraries may read, as torch.from_dlpack and cupy do.

    Borrowed: whoever made it says until when it holds these values.

    Attributes:
        address: of the first element.
        shape: in elements.
        dtype: of an element.
        device: index of the GPU; None for the host's memory.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        device: int | None,
        owner: Owner,
    ) -> None:
        self.address, self.shape, self.dtype, self.device = address, shape, dtype, device
        self._owner = owner

    def copy(self) -> SharedArray:
        """The same values in memory of their own, freed with the last that uses it; waits for them."""
        return self._owner.copy(self)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CPU, 0) if self.device is None else (CUDA, self.device)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """See the array API standard; capsules are unversioned, which every consumer takes."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("this memory is shared where it is; use .copy() first")
        if stream != UNORDERED:
            self._owner.share(1 if stream is None else stream)  # 1: the legacy default stream
        return _export(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """For numpy, which would take this for a scalar object; the host's memory, not copied."""
        if self.device is not None:
            raise TypeError(
                f"this memory is on GPU {self.device}, which numpy cannot read: take "
                "Future.result(), or bring it to the host, as torch.from_dlpack(…).cpu() does"
            )
        return np.array(np.from_dlpack(self), dtype=dtype, copy=copy)  # type: ignore[arg-type]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.device is None:
            raise AttributeError("memory of the host has no __cuda_array_interface__")
        return {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "strides": None,
            "data": (self.address, False), "stream": self._owner.share(None),
        }  # fmt: skip


class HostMemory:
    """The owner of arrays on the host.

    Args:
        arrays: kept as long as any of them is shared.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def shared(self) -> dict[str, SharedArray]:
        """All of them, by name."""
        return {
            name: SharedArray(array.ctypes.data, array.shape, array.dtype, None, self)
            for name, array in self._arrays.items()
        }

    def share(self, stream: int | None) -> None:
        """Nothing to wait for."""

    def copy(self, array: SharedArray) -> SharedArray:
        """See `SharedArray.copy`."""
        return HostMemory({"": np.array(borrow(array))}).shared()[""]


_exported: dict[int, tuple[object, ...]] = {}  # by address, until their deleter is called


def _forget(address: int) -> None:
    _exported.pop(address, None)


def _capsule_dies(capsule: int) -> None:
    if _dying_is_valid(capsule, b"dltensor"):  # nobody took what is in it
        _forget(_dying_pointer(capsule, b"dltensor"))


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_forget)  # called in any thread
_destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_capsule_dies)  # by the interpreter


def _export(array: SharedArray) -> object:
    shape = (ctypes.c_int64 * len(array.shape))(*array.shape)
    managed = _Managed()
    kind, index = array.__dlpack_device__()
    managed.tensor = _Tensor(
        array.address, kind, index, len(array.shape), KINDS.index(array.dtype.kind),
        8 * array.dtype.itemsize, 1, shape, None, 0,
    )  # fmt: skip
    managed.deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    address = ctypes.addressof(managed)
    _exported[address] = (managed, shape, array)
    return _new_capsule(address, b"dltensor", ctypes.cast(_destructor, ctypes.c_void_p))


def _packed(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    return tuple(dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def stream_handle(stream: Any) -> int:
    """The CUstream behind a handle, an object with `__cuda_stream__`, or a torch or cupy stream.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        found = stream.__cuda_stream__  # a method by now, an attribute in its first version
        return int((found() if callable(found) else found)[1])
    for name in ("cuda_stream", "ptr"):  # torch's, cupy's
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise TypeError(f"a stream is a {type(stream).__name__}; expected a handle or __cuda_stream__")
