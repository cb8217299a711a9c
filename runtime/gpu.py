"""Which GPU there is, by ctypes on the driver: asking must not load a CUDA package or make a context."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from comask.kernels.driver import CAPABILITY_MAJOR, CAPABILITY_MINOR


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as an engine depends on it.

    Attributes:
        name: NVIDIA's name of the model.
        capability: of compute, 90 for 9.0.
        driver: newest CUDA version that the driver supports, as 13000 for 13.0.
        memory: bytes in all.
    """

    name: str
    capability: int
    driver: int
    memory: int


def find_gpu(index: int = 0) -> Gpu | None:
    """The GPU with this index; None where there is no driver or no such GPU."""
    return find_gpu_or_reason(index)[0]


def find_gpu_or_reason(index: int = 0) -> tuple[Gpu | None, str]:
    """The GPU, or why there is none."""
    try:
        cuda: Any = ctypes.CDLL("libcuda.so.1")
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
