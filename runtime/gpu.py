"""Finds the machine's GPUs by asking the driver, without a CUDA package or context."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from comask.kernels.run import CAPABILITY_MAJOR, CAPABILITY_MINOR

DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


@dataclass(frozen=True, slots=True)
class Gpu:
    """The properties of a GPU that an engine depends on.

    Attributes:
        name: NVIDIA's name of the model.
        capability: the compute capability, 90 for 9.0.
        driver: the newest CUDA version that the driver supports, 13000 for 13.0.
        memory: total memory in bytes.
    """

    name: str
    capability: int
    driver: int
    memory: int


def find_gpu(index: int = 0) -> Gpu | None:
    """Returns the GPU with this index; None without a driver or such a GPU."""
    return find_gpu_or_reason(index)[0]


def find_gpu_or_reason(index: int = 0) -> tuple[Gpu | None, str]:
    """Returns the GPU and an empty text, or None and the reason."""
    try:
        cuda = libcuda()
    except OSError as error:
        return None, f"no NVIDIA driver ({error})"
    status = cuda.cuInit(0)
    if status:
        return None, f"the NVIDIA driver does not start (cuInit returned {status})"
    count, device = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if index >= count.value:
        return None, f"the driver sees {count.value} GPUs, number {index} was asked for"
    cuda.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    major, minor, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = 10 * major.value + minor.value
    return Gpu(name.value.decode(), capability, version.value, memory.value), ""


def gpu_at(address: int) -> int | None:
    """Returns the index of the GPU that owns an address; None if the driver is missing or knows none."""
    index = ctypes.c_int()
    try:
        status = libcuda().cuPointerGetAttribute(
            ctypes.byref(index), DEVICE_ORDINAL, ctypes.c_uint64(address)
        )
    except OSError:
        return None
    return None if status else index.value


@functools.cache
def libcuda() -> ctypes.CDLL:
    """Returns the driver's library.

    Raises:
        OSError: if no driver is installed.
    """
    return ctypes.CDLL("libcuda.so.1")
