"""A small onnxruntime-gpu: the installed ONNX Runtime, with CUDA in its build, beside libraries of pip's.

What finds and loads libraries is real: ONNX Runtime's own code, and the system's loader. The libraries
are empty, and named as those of CUDA 12, which nothing else here loads.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = (  # where pip puts them, in the order in which they are linked
    "cublas/lib/libcublasLt.so.12",
    "cublas/lib/libcublas.so.12",
    "curand/lib/libcurand.so.10",
    "cuda_runtime/lib/libcudart.so.12",
    "cudnn/lib/libcudnn.so.9",
)
PROVIDERS = (
    "\nget_available_providers = lambda: ['CUDAExecutionProvider', 'CPUExecutionProvider']\n"
)


def make(folder: Path, *, without: str = "", driver: bool = False) -> Path:
    """Makes it in `folder`, which is to stand on PYTHONPATH.

    Args:
        folder: gets the packages `onnxruntime` and `nvidia`.
        without: part of the name of libraries that are not installed.
        driver: whether the provider also needs the driver's library, which is never there.
    """
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make libraries with")
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    real, copy = Path(spec.origin).parent, folder / "onnxruntime"
    for place in (real, real / "capi"):
        (copy / place.relative_to(real)).mkdir(parents=True)
        for path in place.iterdir():
            if path.name not in ("__pycache__", "capi"):
                (copy / path.relative_to(real)).symlink_to(path)
    for name, text in (
        ("__init__.py", (real / "__init__.py").read_text() + PROVIDERS),
        ("capi/build_and_package_info.py", "package_name = 'onnxruntime-gpu'\n"
                                           "__version__ = '9.9.9'\ncuda_version = '12.8'\n"),
    ):  # fmt: skip
        (copy / name).unlink()
        (copy / name).write_text(text)
    made = [_library(folder / "nvidia" / name) for name in LIBRARIES]
    if driver:
        made.append(_library(folder / "libcuda.so.1"))
    _library(copy / "capi" / "libonnxruntime_providers_cuda.so", *made[:4], *made[5:])
    for library in made:
        if (without and without in library.name) or library.parent == folder:
            library.unlink()
    return folder


def _library(path: Path, *needed: Path) -> Path:
    """Makes an empty library that needs others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-x", "none", "-o", path]
    options = [f"-Wl,-soname,{path.name}", "-Wl,--no-as-needed"]
    subprocess.run([*command, *options, *needed], check=True)
    return path


def run_python(folder: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python with this ONNX Runtime in place of the installed one."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
