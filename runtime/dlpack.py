"""Shares memory with other libraries without copies, by DLPack and `__cuda_array_interface__`.

`borrow` reads the memory of other libraries; `SharedArray` lets them read ours. DLPack's structures and
rules are those of dlpack.h 1.0 and of the Python array API's `__dlpack__`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from comask.errors import ImageError
from comask.runtime.gpu import gpu_at

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
KINDS = "iuf"  # numpy's letters of DLDataTypeCode 0..2
UNORDERED = -1  # the stream of a consumer that orders the work itself


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
    # own prototypes, since those of ctypes.pythonapi are shared by the whole process
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_Name = ctypes.c_char_p
_capsule_pointer = _capi("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, _Name)
_capsule_is_valid = _capi("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, _Name)
_new_capsule = _capi(
    "PyCapsule_New", ctypes.py_object, ctypes.c_void_p, _Name, ctypes.c_void_p
)  # fmt: skip
# a capsule that is being destroyed is passed by address: a reference would bring it back to life
_dying_is_valid = _capi("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, _Name)
_dying_pointer = _capi("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, _Name)


class Borrowed:
    """Another library's memory, which it may free once `release` is called or this object is collected.

    Attributes:
        address: address of element 0.
        shape: shape in elements.
        strides: strides in bytes.
        dtype: type of an element.
        device: index of the GPU; None for the host's memory.
        stream: handle of the producer's stream for which the borrower must wait; None if it need not.
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
        """Lets `numpy.asarray` read the memory; the array keeps this object, and so the memory."""
        if self.device is not None:
            raise AttributeError("a GPU's memory is not a numpy array")
        return {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "strides": self.strides,
            "data": (self.address, False),
        }  # fmt: skip

    def view(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Borrowed:
        """Returns a view of a part, which keeps the whole memory until it is released as well.

        Args:
            offset: offset of the part's element 0 in bytes.
            shape: shape in elements.
            strides: strides in bytes.
        """
        return Borrowed(
            self.address + offset, shape, strides, self.dtype, self.device, self._owner, self.stream
        )

    def release(self) -> None:
        """Releases the memory, which nothing may read any longer."""
        self._owner = None


def borrow(source: Any, stream: int = UNORDERED) -> Borrowed:
    """Borrows the memory behind another library's array.

    Args:
        source: an object with `__dlpack__` or `__cuda_array_interface__`, or a numpy array.
        stream: handle of our stream, which a CUDA producer makes wait for its work; `UNORDERED` if the
            caller orders the work itself.

    Raises:
        ImageError: if it is not one of these, or its layout cannot be borrowed.
    """
    if isinstance(source, np.ndarray):  # older numpy refuses DLPack of read-only arrays
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
            f"a frame is on DLPack device {kind}; expected memory of CUDA or of the host"
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
    # the capsule keeps its name, so that it frees the tensor with its last reference
    return Borrowed(
        (tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, device, capsule
    )  # fmt: skip


def _from_cuda_array_interface(source: Any, *, ordered: bool) -> Borrowed:
    interface: Mapping[str, Any] = source.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise ImageError("a frame has a mask in its __cuda_array_interface__; expected none")
    strides, address = interface.get("strides"), int(interface["data"][0])
    # the interface does not tell the GPU; cupy's arrays do
    index = getattr(getattr(source, "device", None), "id", None)
    if index is None and (index := gpu_at(address)) is None:
        raise ImageError(
            f"a frame with __cuda_array_interface__ lies at {address:#x}, which CUDA's driver does not "
            "know as memory of a GPU"
        )
    return Borrowed(
        address,
        tuple(interface["shape"]),
        None if strides is None else tuple(strides),
        np.dtype(interface["typestr"]),
        int(index),
        source,
        None if ordered else interface.get("stream"),
    )


class Owner(Protocol):
    """The owner of a `SharedArray`'s memory."""

    def share(self, stream: int | None) -> int | None:
        """Makes a consumer's stream wait until the memory is written.

        Args:
            stream: the consumer's handle; None for a consumer that waits for our stream by itself.

        Returns:
            handle of our stream; None on the host.

        Raises:
            RuntimeError: if the memory holds other values by now.
        """

    def copy(self, array: SharedArray) -> SharedArray:
        """Waits for an array of this memory and copies it; see `SharedArray.copy`."""


class SharedArray:
    """C-contiguous memory of ours for other libraries to read, with torch.from_dlpack for example.

    The memory is borrowed: the method that returned it says how long it holds these values.

    Attributes:
        address: address of the first element.
        shape: shape in elements.
        dtype: type of an element.
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
        """Waits for the values and copies them to memory that is freed with its last user."""
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
        """Implements the array API standard; capsules are unversioned, which every consumer accepts."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("this memory is shared only in place; use .copy() first")
        if stream != UNORDERED:
            self._owner.share(1 if stream is None else stream)  # 1: the legacy default stream
        return _export(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Lets numpy, which would take this object for a scalar, read the host's memory in place."""
        if self.device is not None:
            raise TypeError(
                f"this memory is on GPU {self.device}, which numpy cannot read: take "
                "Future.result(), or bring it to the host, as torch.from_dlpack(…).cpu() does"
            )
        return np.array(np.from_dlpack(self), dtype=dtype, copy=copy)  # type: ignore[arg-type]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.device is None:
            raise AttributeError("the host's memory has no __cuda_array_interface__")
        return {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "strides": None,
            "data": (self.address, False), "stream": self._owner.share(None),
        }  # fmt: skip


class HostMemory:
    """Owns arrays on the host.

    Args:
        arrays: the arrays, which live as long as any of them is shared.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def shared(self) -> dict[str, SharedArray]:
        """Returns the arrays by name."""
        return {
            name: SharedArray(array.ctypes.data, array.shape, array.dtype, None, self)
            for name, array in self._arrays.items()
        }

    def share(self, stream: int | None) -> None:
        """Does nothing: the memory is already written."""

    def copy(self, array: SharedArray) -> SharedArray:
        """Copies one of the arrays."""
        return HostMemory({"": np.array(borrow(array))}).shared()[""]


_exported: dict[int, tuple[object, ...]] = {}  # by address, until their deleter is called


def _forget(address: int) -> None:
    _exported.pop(address, None)


def _capsule_dies(capsule: int) -> None:
    if _dying_is_valid(capsule, b"dltensor"):  # no consumer took the tensor
        _forget(_dying_pointer(capsule, b"dltensor"))


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_forget)  # any thread may call it
_destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_capsule_dies)  # the interpreter calls it


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
    """Returns the CUstream behind a handle, an object with `__cuda_stream__`, or a torch or cupy stream.

    Raises:
        TypeError: if the object is not one of these.
    """
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__  # a method; an attribute in the protocol's first version
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr"):  # torch's, cupy's
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise TypeError(f"a stream is a {type(stream).__name__}; expected a handle or __cuda_stream__")
