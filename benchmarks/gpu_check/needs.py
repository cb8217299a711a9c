"""Finds out what a machine lacks, by the names that rows have in `Check.needs`.

Nothing heavy is imported here: whether a package that is there also works is for the first row of its
group to tell, and other rows need what that row `provides`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial

REHEARSAL = "a rehearsal has no GPU"
STAND_IN = "a stand-in takes its place"
# requirement → the module that must be there, and how to get it
PACKAGES = {
    "torch": ("torch", "torch"),
    "torchvision": ("torchvision", "torchvision"),
    "safetensors": ("safetensors", "safetensors"),
    "onnx": ("onnx", "onnx onnxscript"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "opencv": ("cv2", "opencv-python-headless"),
    "pycocotools": ("pycocotools", "pycocotools"),
    "faster-coco-eval": ("faster_coco_eval", "faster-coco-eval"),
    "click": ("click", "click rich"),
    "matplotlib": ("matplotlib", "matplotlib"),
    "pycuda": ("pycuda", "pycuda"),
    "cupy": ("cupy", "cupy-cuda13x"),
    "av": ("av", "av"),
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13"),
}
LIBRARIES = {"NVDEC": "libnvcuvid.so.1", "NVENC": "libnvidia-encode.so.1"}
# In a rehearsal, stand-ins take the place of these.
STOOD_IN = ("GPU", "cupy", "tensorrt", "tensorrt-rtx", "NVDEC")


def _driver() -> str:
    from comask.runtime.gpu import find_gpu_or_reason

    return find_gpu_or_reason()[1]


def _package(module: str, package: str) -> str:
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a broken installation, which its first row will tell
        found = True
    return "" if found else f"{module} is not installed: pip install {package}"


def _library(name: str) -> str:
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return (
            f"the driver's video libraries are missing ({error}); in a container, "
            "NVIDIA_DRIVER_CAPABILITIES must include video"
        )
    return ""


def _host_compiler() -> str:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    if any(shutil.which(name) for name in names):
        return ""
    return f"no C++ compiler: found none of {', '.join(names)} on PATH"


def _cuda_compiler() -> str:
    if shutil.which("nvcc") or not _package("cuda.bindings", "cuda-bindings"):
        return ""
    return "no CUDA compiler: neither cuda-bindings nor nvcc is installed"


FINDERS: dict[str, Callable[[], str]] = {
    "GPU": _driver,
    "real GPU": lambda: "",
    "C++ compiler": _host_compiler,
    "CUDA compiler": _cuda_compiler,
    **{name: partial(_package, *there) for name, there in PACKAGES.items()},
    **{name: partial(_library, library) for name, library in LIBRARIES.items()},
}


def why_missing(need: str, *, rehearsal: bool) -> str:
    """Returns why a requirement is missing, or an empty text.

    Raises:
        KeyError: if there is no such requirement.
    """
    if rehearsal and need == "real GPU":
        return REHEARSAL
    if rehearsal and need in STOOD_IN:
        return ""
    return FINDERS[need]()
