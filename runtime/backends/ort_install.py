"""The installation of ONNX Runtime: which packages bring it, and whether CUDA's libraries load.

`onnxruntime`, `onnxruntime-gpu` and others bring the same module, so only one of them may be installed:
the second one overwrites files of the first. CUDA's and cuDNN's libraries come as packages of their own,
whose folders the system's loader does not search, so they have to be loaded before the provider is.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from comask.errors import BackendUnavailableError, one_line

MODULE = "onnxruntime"
NEEDED = "pip install 'comask[ort]' on a CPU, or 'comask[gpu]' on a GPU"
PROVIDER_LIBRARY = "libonnxruntime_providers_cuda.so"
SHARED_LIBRARY = "libonnxruntime_providers_shared.so"  # what every provider's library calls
CUDNN = "libcudnn.so.9"  # of ONNX Runtime 1.19 and newer, which open it when a convolution needs it
TRIAL = f"""
from {__name__} import cuda_loading_error, load_cuda_libraries
load_cuda_libraries()
print(cuda_loading_error())
"""

logger = logging.getLogger(__name__)
_loading = threading.Lock()


def import_onnxruntime() -> Any:
    """Imports ONNX Runtime.

    Raises:
        BackendUnavailableError: if it cannot be imported, or files of it are missing; the text says what
            to install.
    """
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"the onnxruntime backend cannot be imported ({one_line(error)}): {NEEDED}"
        ) from error
    # of two packages, removing one removes files of the other: the folder stays, as an empty module
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BackendUnavailableError(
            f"the onnxruntime backend cannot be imported (its module is empty): {reinstall('ort')}"
        )
    return onnxruntime


def packages() -> dict[str, str]:
    """Returns the installed packages that bring the module `onnxruntime`, with their versions."""
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        named = package.name or ""  # None where a removal was interrupted
        if named.startswith((MODULE, "ort-")):
            modules = package.read_text("top_level.txt") or ""
            if MODULE in modules.split():
                # of one name, the first on the path is the one that Python takes
                found.setdefault(named, package.version)
    return dict(sorted(found.items()))


def reinstall(extra: str) -> str:
    """Returns the commands that leave one ONNX Runtime, whatever is installed now.

    Args:
        extra: the extra that brings it: `ort` for a CPU, `gpu` for a GPU.
    """
    there = packages()
    remove = f"pip uninstall --yes {' '.join(there)}; " if there else ""
    return f"{remove}pip install 'comask[{extra}]'"


def load_cuda_libraries() -> None:
    """Loads the libraries of CUDA and cuDNN that pip installed, for the CUDA provider to find.

    Call it before the first session on CUDA; later calls do nothing. What cannot be loaded is logged and
    is no error, because the provider may find it elsewhere, or do without.
    """
    with _loading:
        _load_cuda_libraries()


@functools.cache
def _load_cuda_libraries() -> None:
    preload = getattr(import_onnxruntime(), "preload_dlls", None)
    if preload is None:  # ONNX Runtime 1.20
        return
    said: list[str] = []
    # It prints what fails. Its module gets a `print` of its own meanwhile, since to redirect sys.stdout
    # would take away what other threads print.
    names = preload.__globals__
    names["print"] = lambda *words, **_: said.append(one_line(" ".join(map(str, words))))
    try:
        preload(directory="")  # "": pip's folders, then the system's
    except Exception as error:  # whether the provider starts without it will be seen
        said.append(one_line(error))
    finally:
        names.pop("print", None)
    if said:
        logger.info("ONNX Runtime's CUDA libraries: %s", "; ".join(said))


def cuda_loading_error() -> str:
    """Returns the loader's reason why the CUDA provider or cuDNN cannot be loaded; empty if they can be.

    Call it only after a session has tried to use the provider, or in a process that opens none: when it
    is loaded, the library asks for functions that ONNX Runtime passes to it right before.
    """
    folder = Path(import_onnxruntime().__file__).parent / "capi"
    if not (folder / PROVIDER_LIBRARY).exists():  # a build that has its providers elsewhere
        return ""
    try:
        ctypes.CDLL(str(folder / SHARED_LIBRARY), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / PROVIDER_LIBRARY))
        ctypes.CDLL(CUDNN)
    except OSError as error:
        return one_line(error)
    return ""


def cuda_loading_error_in_new_process() -> str:
    """Returns `cuda_loading_error` of a process that loaded nothing else, so no CUDA of PyTorch's."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", TRIAL],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the process that tries it: {one_line(error)}"
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return f"the process that tries it ends with {done.returncode}: {one_line(last)}"
    return one_line(done.stdout)


def cuda_fix(reason: str) -> str:
    """Returns what to do where the CUDA provider of a build that has it does not start.

    Args:
        reason: the loader's reason, or ONNX Runtime's.
    """
    if "libcuda.so" in reason:
        return "install NVIDIA's driver, or pass the GPU to the container"
    if len(packages()) > 1:
        return reinstall("gpu")
    if "cannot open shared object file" in reason or "cuDNN" in reason:
        return "pip install 'comask[gpu]', which brings the libraries of CUDA and cuDNN"
    return "check that nvidia-smi shows the GPU, and a driver for this version of CUDA"


def why_cuda_fails(error: Exception | None) -> str:
    """Returns in one line why a session did not get the CUDA provider, and what to do.

    Args:
        error: what ONNX Runtime raised; None if it went on with another provider.
    """
    if error is None:
        reason = cuda_loading_error() or "ONNX Runtime does not say why"
    else:
        # before it come the names of C++ functions, after it those of the machine and of a file
        text = one_line(error)
        reason = text[max(text.find("CUDA failure"), 0) :].partition(" ; ")[0]
    return f"{reason}: {cuda_fix(reason)}"
