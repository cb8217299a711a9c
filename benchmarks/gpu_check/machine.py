"""Describes the machine of a table by its versions and GPU, never by its name or user."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

from places import COMMIT, UPLOADED

PACKAGES = (
    "torch", "torchvision", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13",
    "pycuda", "cuda-bindings", "cupy-cuda13x", "av", "numpy",
)  # fmt: skip


def facts() -> dict[str, Any]:
    """Returns operating system, Python, GPU, driver and versions, in the order of the table's head."""
    from comask import __version__
    from comask.runtime.gpu import find_gpu_or_reason

    gpu, reason = find_gpu_or_reason()
    return {
        "comask": __version__,
        "commit": _output("git", "describe", "--always", "--dirty") or _uploaded_commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": gpu.name if gpu else reason,
        "capability": gpu.capability if gpu else None,
        "memory_gib": round(gpu.memory / 2**30) if gpu else None,
        "cuda_driver": gpu.driver if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **{name: _version(name) for name in PACKAGES},
    }


def _uploaded_commit() -> str | None:
    files = sorted(UPLOADED.glob(f"*/{COMMIT}"))
    return files[0].read_text(encoding="utf-8").strip() if files else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.splitlines()[0].strip() if result.stdout.strip() else None
