"""Diagnoses what this machine can run, for `comask doctor`; `doctor_bundle.py` diagnoses a bundle."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from comask import __version__
from comask.errors import (
    BackendUnavailableError,
    KernelError,
    KernelUnavailableError,
    one_line,
)
from comask.kernels.compile import gpu_module, host_library
from comask.kernels.launch import FRAME, MASKS, NMS, ROI_ALIGN
from comask.runtime.backends.ort import CUDA_PROVIDER
from comask.runtime.backends.ort_install import (
    cuda_fix,
    cuda_loading_error_in_new_process,
    packages,
    reinstall,
)
from comask.runtime.gpu import find_gpu, find_gpu_or_reason
from comask.runtime.trt.flavor import LIBRARY, MODULES, PACKAGES, load_flavor, wheel_library

NEWEST_PYTHON = (3, 13)
KERNELS = (ROI_ALIGN, NMS, FRAME, MASKS)
FALLBACK_CAPABILITY = 80  # what the kernels are compiled for on a machine without a GPU

Status = Literal["ok", "absent", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: the subject of the check.
        status: `ok`; `absent`, which is a fault only if it is needed; `broken`, which always is one.
        found: the version or state that was found, or why it is missing.
        fix: the command or step that fixes it; empty if nothing is wrong.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


class Advice(Exception):  # noqa: N818, not always an error
    """Raised by a check whose finding the user can do something about; see `Finding`."""

    def __init__(self, status: Status, found: object, fix: str) -> None:
        self.status, self.found, self.fix = status, one_line(found), fix


def run_check(name: str, check: Callable[[], str]) -> Finding:
    """Runs a check, which returns what it found if all is well and raises `Advice` otherwise."""
    try:
        return Finding(name=name, status="ok", found=check())
    except Advice as advice:
        return Finding(name=name, status=advice.status, found=advice.found, fix=advice.fix)


def diagnose() -> list[Finding]:
    """Checks everything that comask can use on this machine, which takes seconds."""
    return [run_check(name, check) for name, check in CHECKS.items()]


def _version(package: str, install: str) -> str:
    """Returns the version of an installed package without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise Advice("absent", "not installed", install) from error


def _module(name: str, install: str, reinstall: str) -> Any:
    """Imports a module.

    Args:
        name: the module's name.
        install: pip's arguments that install a missing module.
        reinstall: pip's arguments that repair a broken module.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Advice("absent", "not installed", f"pip install {install}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise Advice("broken", error, f"pip install {reinstall}") from error


def _python() -> str:
    here = f"{platform.system()} {platform.machine()}, {sys.executable}"
    found = f"{platform.python_version()} on {here}"
    if sys.version_info[:2] > NEWEST_PYTHON:
        found += f"; comask is tested up to {'.'.join(map(str, NEWEST_PYTHON))}"
    return found


def _gpu() -> str:
    gpu, reason = find_gpu_or_reason()
    if gpu is None:
        fix = "if there is an NVIDIA GPU, install its driver"
        if shutil.which("nvidia-smi") is not None:
            fix = "run nvidia-smi, which tells more"
        raise Advice("absent", reason, fix)
    return (
        f"{gpu.name}, sm{gpu.capability}, {gpu.memory / 2**30:.0f} GiB, driver for CUDA "
        f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
    )


def _torch() -> str:
    torch = _module("torch", "'comask[train]'", "--force-reinstall 'comask[train]'")
    found = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if find_gpu() is not None and not torch.cuda.is_available():
        fix = "install a torch built for this driver's CUDA, or a newer driver"
        raise Advice("broken", f"{found}; it does not see the GPU", fix)
    return found


def _torchvision() -> str:
    # torchvision raises RuntimeError if its operators do not fit the installed torch
    pair = "--upgrade torch torchvision (a matching pair; torch 2.13 has none)"
    version: str = _module("torchvision", "'comask[train]'", pair).__version__
    return version


def _onnxruntime() -> str:
    gpu = find_gpu() is not None
    extra = "gpu" if gpu else "ort"
    imported = run_check("onnxruntime", partial(_imported_onnxruntime, extra))
    if len(there := packages()) > 1:
        names = " and ".join(f"{name} {version}" for name, version in there.items())
        found = f"{names} overwrite each other; what Python imports is {imported.found}"
        raise Advice("broken", found, reinstall(extra))
    if imported.status != "ok":
        raise Advice(imported.status, imported.found, imported.fix)
    module = importlib.import_module("onnxruntime")
    if CUDA_PROVIDER not in module.get_available_providers():
        if gpu:
            raise Advice("ok", imported.found, f"for the GPU: {reinstall('gpu')}")
        return imported.found
    libraries = f"{imported.found}; its libraries of CUDA {getattr(module, 'cuda_version', '')}"
    if error := cuda_loading_error_in_new_process():
        found = f"{libraries} do not load: {error}"
        raise Advice("broken" if gpu else "ok", found, cuda_fix(error))
    return f"{libraries} load"


def _openvino() -> str:
    install = "'comask[openvino]'"
    module = _module("openvino", install, f"--force-reinstall {install}")
    core = module.Core()
    devices = [
        f"{name} ({', '.join(core.get_property(name, 'OPTIMIZATION_CAPABILITIES'))})"
        for name in core.available_devices
    ]
    return f"{module.__version__.partition('-')[0]}: {'; '.join(devices) or 'no device'}"


def _imported_onnxruntime(extra: str) -> str:
    """Returns version and providers of the ONNX Runtime that Python imports."""
    package = next(iter(packages()), f"'comask[{extra}]'")
    module = _module("onnxruntime", f"'comask[{extra}]'", f"--force-reinstall {package}")
    if not hasattr(module, "get_available_providers"):  # see `import_onnxruntime`
        raise Advice("broken", "an empty module", reinstall(extra))
    providers = (
        name.removesuffix("ExecutionProvider") for name in module.get_available_providers()
    )
    return f"{module.__version__}: {', '.join(providers)}"


def _flavor(name: str) -> str:
    try:
        return load_flavor(name).version
    except BackendUnavailableError as error:
        install = f"pip install {PACKAGES[name]}"
        if importlib.util.find_spec(MODULES[name]) is None:
            _version(PACKAGES[name], install)
        reinstall = f"pip install --force-reinstall {PACKAGES[name]}"
        raise Advice("broken", error.__cause__ or error, reinstall) from error


def _rtx_wheel() -> str:
    """Names the link that other programs need; comask's builds make it themselves (`wheel_library`)."""
    library = wheel_library()
    if library is None:
        return "work"
    return (
        f"the wheel lacks {LIBRARY}; comask's builds work without it, other programs need: "
        f"ln -s {library.name} {library.parent / LIBRARY}"
    )


def _pycuda() -> str:
    version = _version(
        "pycuda",
        "pip install 'comask[gpu]' (compiles for a minute or two; needs g++ and the CUDA toolkit)",
    )
    try:
        importlib.import_module("pycuda.driver")
    except (ImportError, OSError) as error:
        if "libcuda" in str(error):
            found = f"{version}, but NVIDIA's driver is missing ({error})"
            raise Advice("absent", found, "see the line of the gpu") from error
        reinstall = "pip install --force-reinstall --no-cache-dir pycuda"
        raise Advice("broken", error, reinstall) from error
    return version


def _host_kernels() -> str:
    try:
        for source in KERNELS:
            host_library(source)
    except KernelUnavailableError as error:
        found = f"PyTorch falls back to torchvision's operators: {error}"
        raise Advice("absent", found, "install g++, or set $CXX") from error
    except KernelError as error:
        raise Advice("broken", error, "set $CXX to another compiler") from error
    return "compile"


def _cuda_kernels() -> str:
    gpu = find_gpu()
    capability = gpu.capability if gpu else FALLBACK_CAPABILITY
    try:
        for source in KERNELS:
            gpu_module(source, capability)
    except KernelError as error:
        fix = "pip install 'comask[gpu]', or put the CUDA toolkit's nvcc on PATH"
        raise Advice("broken" if gpu else "absent", error, fix) from error
    return f"compile for sm{capability}{'' if gpu else ' (a trial: this machine has no GPU)'}"


def _extra(package: str, extra: str) -> str:
    """Returns the version of a package that an extra brings and that takes seconds to import."""
    return _version(package, f"pip install 'comask[{extra}]'")


CHECKS: Mapping[str, Callable[[], str]] = {
    "python": _python,
    "comask": lambda: __version__,
    "gpu": _gpu,
    "torch": _torch,
    "torchvision": _torchvision,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": partial(_flavor, "tensorrt"),
    "tensorrt-rtx": partial(_flavor, "tensorrt-rtx"),
    "tensorrt-rtx plugins": _rtx_wheel,
    "pycuda": _pycuda,
    "kernels for the CPU": _host_kernels,
    "kernels for the GPU": _cuda_kernels,
    "av": partial(_extra, "av", "video"),
    "trackers": partial(_extra, "trackers", "track"),
    "ray": partial(_extra, "ray", "jobs"),
    "pyarrow": partial(_extra, "pyarrow", "jobs"),
    "fsspec": partial(_extra, "fsspec", "jobs"),
}
