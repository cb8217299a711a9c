"""The machine that something is measured on, and what this process takes of it.

Read from /proc of Linux and from the GPU's driver. Names of hosts and users are never read.
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
from comask.runtime.backends import Device
from comask.runtime.device import find_gpu

PACKAGES = (
    "numpy", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "pycuda",
)  # fmt: skip
CPU_FACTS = Path("/proc/cpuinfo")
STATUS, TASKS, FILES = Path("/proc/self/status"), Path("/proc/self/task"), Path("/proc/self/fd")
SCHEDULE = Path("/proc/thread-self/schedstat")
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts of a machine, in the order in which reports list them.

    Attributes:
        cpu: model of the processor.
        cores: CPU cores that this process may use.
        load: the system's load average of the last minute. It is near 0 on a free machine; times are
            to be trusted while it is below `cores`. None where the system does not tell.
        omp_num_threads: the environment variable; None where it is not set.
        gpu: model of the GPU; None without one.
        system: operating system and architecture.
        versions: of comask, Python and those of `PACKAGES` that are installed.
    """

    cpu: str
    cores: int
    load: float | None
    omp_num_threads: str | None
    gpu: str | None
    system: str
    versions: dict[str, str]

    def __str__(self) -> str:
        """The machine in half a line."""
        limit = self.omp_num_threads
        threads = "" if limit is None else f", OMP_NUM_THREADS={limit}"
        gpu = f", {self.gpu}" if self.gpu else ""
        load = "" if self.load is None else f", load {self.load:.1f} before"
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{cores} of {self.cpu}{threads}{gpu}{load}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every report on a bundle begins with; `dataclasses.asdict` of a report is its JSON.

    Attributes:
        bundle: path of the bundle, as it was given.
        when: date and time in UTC, ISO 8601.
        machine: that it was measured on.
    """

    bundle: str
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    machine: Machine


def describe_machine(device: Device) -> Machine:
    """Facts of this machine.

    Args:
        device: as `Predictor.load` takes it: which GPU is described, if there is one; `cpu` for none.
    """
    gpu = None if device == "cpu" else find_gpu(device or 0)
    return Machine(
        cpu=_cpu(),
        cores=cores(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        gpu=gpu.name if gpu else None,
        system=f"{platform.system()} {platform.machine()}",
        versions={"comask": __version__, "python": platform.python_version(), **_versions()},
    )


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    return next(iter(_facts(CPU_FACTS, "model name")), "") or (
        platform.processor() or platform.machine()
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _facts(file: Path, name: str) -> list[str]:
    """The values of lines `name: value` of a file of /proc; empty where there is no such file."""
    if not file.exists():
        return []
    return re.findall(rf"^{name}[ \t]*:[ \t]*(.*?)[ \t]*$", file.read_text(), re.MULTILINE)


def require_proc() -> None:
    """Whether this process's memory, threads and files can be read.

    Raises:
        ComaskError: this is not Linux.
    """
    if not STATUS.exists():
        raise ComaskError("memory, threads and files are read from /proc: --soak needs Linux")


def resident_bytes() -> int:
    """Memory of the system that this process holds, shared libraries among it."""
    (size,) = _facts(STATUS, "VmRSS")
    return 1024 * int(size.removesuffix(" kB"))


def peak_resident() -> int | None:
    """The most bytes that this process ever held; None where the system does not tell."""
    # Not getrusage's: on Linux a process inherits that from the one which started it.
    sizes = _facts(STATUS, "VmHWM")
    return 1024 * int(sizes[0].removesuffix(" kB")) if sizes else None


def thread_count() -> int:
    """Threads of this process, those of libraries too."""
    return len(os.listdir(TASKS))


def open_files() -> int:
    """File descriptors of this process: files, sockets, pipes, devices."""
    return len(os.listdir(FILES)) - 1  # one is of the listing


def waited_seconds() -> float:
    """For how long this thread was ready and others had the processor; 0 where that is not counted."""
    return int(SCHEDULE.read_text().split()[1]) / 1e9 if SCHEDULE.exists() else 0.0


def clock_mhz() -> float | None:
    """Clock of the processor, the mean of its cores; None where the system does not tell."""
    clocks = [float(clock) for clock in _facts(CPU_FACTS, "cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def used_gpu_memory(index: int) -> int | None:
    """Bytes of a GPU that are in use, whoever uses them, this process's CUDA context among them.

    Args:
        index: of the GPU.

    Returns:
        None where there is no such GPU.
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
