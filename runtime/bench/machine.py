"""Describes the machine of a measurement, and measures this process's memory, threads and files.

Everything is read from Linux's /proc and the GPU's driver. Names of hosts and users are never read.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from comask import __version__
from comask.errors import ComaskError
from comask.parallel import cores
from comask.runtime.backends.names import Device, gpu_index
from comask.runtime.gpu import find_gpu

PACKAGES = (
    "numpy", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13",
    "pycuda",
)  # fmt: skip
CPU_FACTS = Path("/proc/cpuinfo")
STATUS, TASKS, FILES = Path("/proc/self/status"), Path("/proc/self/task"), Path("/proc/self/fd")
SCHEDULE = Path("/proc/thread-self/schedstat")
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts about a machine, in the order in which reports list them.

    Attributes:
        cpu: model of the processor.
        cores: the number of CPU cores that this process may use.
        load: the system's load average of the last minute. It is near 0 on an idle machine; times are
            reliable while it is below `cores`. None if the system does not tell.
        omp_num_threads: the environment variable; None if it is not set.
        gpu: model of the GPU; None without one.
        system: operating system and architecture.
        versions: versions of comask, Python and the installed ones of `PACKAGES`.
    """

    cpu: str
    cores: int
    load: float | None
    omp_num_threads: str | None
    gpu: str | None
    system: str
    versions: dict[str, str]

    def __str__(self) -> str:
        """Returns the machine in half a line."""
        limit = self.omp_num_threads
        threads = "" if limit is None else f", OMP_NUM_THREADS={limit}"
        gpu = f", {self.gpu}" if self.gpu else ""
        load = "" if self.load is None else f", load {self.load:.1f} before"
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{cores} of {self.cpu}{threads}{gpu}{load}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The first fields of every report on a bundle; `dataclasses.asdict` of a report is its JSON.

    Attributes:
        bundle: path of the bundle, as it was given.
        when: date and time in UTC, ISO 8601.
        machine: the machine of the measurement.
    """

    bundle: str
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    machine: Machine


def describe_machine(device: Device) -> Machine:
    """Returns the facts about this machine.

    Args:
        device: the device of `Predictor.load`, whose GPU is described if it exists; `cpu` for none.
    """
    index = gpu_index(device)
    gpu = None if index is None else find_gpu(index)
    return Machine(
        cpu=processor(),
        cores=cores(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        gpu=gpu.name if gpu else None,
        system=f"{platform.system()} {platform.machine()}",
        versions={"comask": __version__, "python": platform.python_version(), **_versions()},
    )


def processor() -> str:
    """Returns the name of this machine's processor."""
    return next(iter(_facts(CPU_FACTS, "model name")), "") or (
        platform.processor() or platform.machine()
    )


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _facts(file: Path, name: str) -> list[str]:
    """Returns the values of all lines `name: value` of a file in /proc; empty without the file."""
    if not file.exists():
        return []
    return re.findall(rf"^{name}[ \t]*:[ \t]*(.*?)[ \t]*$", file.read_text(), re.MULTILINE)


def require_proc() -> None:
    """Checks that this process's memory, threads and files can be read.

    Raises:
        ComaskError: if this is not Linux.
    """
    if not STATUS.exists():
        raise ComaskError("comask soak needs Linux: memory, threads and files are read from /proc")


def resident_bytes() -> int:
    """Returns the bytes of the system's memory that this process holds, shared libraries included."""
    (size,) = _facts(STATUS, "VmRSS")
    return 1024 * int(size.removesuffix(" kB"))


def peak_resident() -> int | None:
    """Returns the most bytes that this process ever held; None if the system does not tell."""
    # not getrusage: on Linux a process inherits its peak from the process that started it
    sizes = _facts(STATUS, "VmHWM")
    return 1024 * int(sizes[0].removesuffix(" kB")) if sizes else None


def thread_count() -> int:
    """Returns the number of this process's threads, including those of libraries."""
    return len(os.listdir(TASKS))


def open_files() -> int:
    """Returns the number of this process's file descriptors: files, sockets, pipes, devices."""
    return len(os.listdir(FILES)) - 1  # one belongs to the listing itself


def waited_seconds() -> float:
    """Returns the seconds that this thread waited for a processor; 0 if the system does not count."""
    return int(SCHEDULE.read_text().split()[1]) / 1e9 if SCHEDULE.exists() else 0.0


def clock_mhz() -> float | None:
    """Returns the mean clock of the processor's cores; None if the system does not tell."""
    clocks = [float(clock) for clock in _facts(CPU_FACTS, "cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def used_gpu_memory(index: int) -> int | None:
    """Returns the bytes of a GPU's memory that all processes use, this one's CUDA context included.

    Args:
        index: index of the GPU.

    Returns:
        the bytes; None if the GPU does not exist.
    """
    if find_gpu(index) is None:
        return None
    cuda: Any = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    status = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if status:
        return None
    cuda.cuCtxPushCurrent_v2(context)
    status = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    return None if status else total.value - free.value
