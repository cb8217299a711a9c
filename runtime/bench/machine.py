"""The machine that something was measured on: processor, GPU and versions; never its name or its user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Literal

from comask import __version__
from comask.runtime.gpu import find_gpu

PACKAGES = (
    "numpy", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "pycuda",
)  # fmt: skip
CPU_FACTS = Path("/proc/cpuinfo")


def describe_machine(device: int | Literal["cpu"] | None) -> dict[str, Any]:
    """Facts of this machine; `versions` holds the packages that are installed.

    `load` is the system's load average of the last minute: on a free machine near 0, and times are to
    be trusted while it is below `cores`. None where the system has none.

    Args:
        device: as `Predictor.load` takes it: which GPU is described, if there is one; `cpu` for none.
    """
    gpu = None if device == "cpu" else find_gpu(device or 0)
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "gpu": gpu.name if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"comask": __version__, "python": platform.python_version(), **_versions()},
    }


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    if CPU_FACTS.exists():
        for line in CPU_FACTS.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
