"""The flavors of TensorRT: imports the library, TensorRT or TensorRT-RTX, and keeps what it logs."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comask.errors import BackendUnavailableError

__all__ = ["load_flavor"]

LIBRARY = "libtensorrt_rtx.so"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # flavor → module
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
OLDEST = 10  # the first version with IPluginV3 and strong typing
KEPT_LINES = 50  # of TensorRT's log, for error messages
NO_DRIVER = "CUDA driver version is insufficient"

logger = logging.getLogger(__name__)


def wheel_library() -> Path | None:
    """Returns the wheel's library if its unversioned name is missing; None if nothing is missing."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return None  # TensorRT-RTX did not come as a wheel; the system's linker finds its library
    folder = Path(spec.origin).parent
    if (folder / LIBRARY).exists():  # the parser searches its own folder
        return None
    versioned = sorted(folder.glob(f"{LIBRARY}.*"))
    if not versioned or _loads(LIBRARY):
        return None
    return versioned[-1]


def search_path(folder: Path) -> str | None:
    """Returns the LD_LIBRARY_PATH that a new process needs to parse plugins; None if it needs none.

    Args:
        folder: an existing folder, in which the missing link is created.
    """
    library = wheel_library()
    if library is None:
        return None
    link = folder / LIBRARY
    if not link.is_symlink():
        link.symlink_to(library)
    rest = os.environ.get("LD_LIBRARY_PATH")
    return f"{folder}:{rest}" if rest else str(folder)


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class Flavor:
    """One imported TensorRT.

    Attributes:
        name: `tensorrt` or `tensorrt-rtx`.
        trt: the module.
        version: the module's version.
        log: TensorRT's `ILogger`; a process can have only one, so everything must use this one.
        lines: the latest warnings and errors, oldest first, each with whether it is an error.
        plugin_errors: errors that our plugins raised inside TensorRT, which drops them.
    """

    name: str
    trt: Any
    version: str
    log: Any
    lines: deque[tuple[bool, str]]
    plugin_errors: list[str]

    def errors(self) -> str:
        """Returns, in one line, what failed since `clear`: our plugins' errors, TensorRT's, or warnings.

        If several threads run engines, the line may contain errors of another thread.
        """
        lines = self.lines.copy()  # other threads log meanwhile
        errors = list(self.plugin_errors) or [text for is_error, text in lines if is_error]
        told = list(dict.fromkeys(errors or [text for _, text in lines]))
        # without a GPU every failing call logs this line as well
        told = [text for text in told if NO_DRIVER not in text] or told
        return "; ".join(told) or "it logged nothing"

    def clear(self) -> None:
        """Drops all logged lines and errors."""
        self.lines.clear()
        self.plugin_errors.clear()


@functools.cache
def load_flavor(name: str) -> Flavor:
    """Imports a flavor.

    Args:
        name: `tensorrt` or `tensorrt-rtx`.

    Raises:
        BackendUnavailableError: if it cannot be imported, or is older than 10.
    """
    # find_spec proves nothing: some installations have the bindings without the library
    try:
        trt: Any = importlib.import_module(MODULES[name])
        version = str(trt.__version__)
    except (ImportError, OSError, AttributeError) as error:
        raise BackendUnavailableError(
            f"{name} cannot be imported ({' '.join(str(error).split())}): "
            f"pip install {PACKAGES[name]}"
        ) from error
    if name == "tensorrt" and int(version.partition(".")[0]) < OLDEST:
        raise BackendUnavailableError(
            f"tensorrt {version} is too old: comask needs {OLDEST} or newer; "
            f"pip install --upgrade {PACKAGES[name]}"
        )
    lines: deque[tuple[bool, str]] = deque(maxlen=KEPT_LINES)
    return Flavor(name, trt, version, _new_log(trt, lines), lines, [])


def _new_log(trt: Any, lines: deque[tuple[bool, str]]) -> Any:
    severity = trt.ILogger.Severity
    errors = (severity.INTERNAL_ERROR, severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors for our own messages."""

        def log(self, severity: Any, text: str) -> None:
            if severity in (*errors, trt.ILogger.Severity.WARNING):
                lines.append((severity in errors, " ".join(text.split())))
            logger.debug("%s", text)  # our exceptions repeat what matters

    return Log()
