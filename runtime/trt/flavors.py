"""The two TensorRTs: which is installed, why one is not importable, and its log.

`tensorrt` 10 and 11 and `tensorrt_rtx` have one Python interface but for what `hasattr` tells apart.
Neither is imported before it is asked for: importing loads a gigabyte of libraries.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

from comask.errors import BackendUnavailableError

__all__ = ["load_flavor"]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # flavor → module
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
OLDEST = 10  # IPluginV3 and strong typing
KEPT_LINES = 50  # of the log, for error messages
NO_DRIVER = "CUDA driver version is insufficient"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Flavor:
    """One imported TensorRT.

    Attributes:
        name: `tensorrt` or `tensorrt-rtx`.
        trt: the module.
        version: as it names itself.
        log: TensorRT's `ILogger`; it takes one a process, so everything must use this one.
        lines: the latest warnings and errors, oldest first, each with whether it is an error.
        plugin_errors: what our plugins raised inside TensorRT, which drops it.
    """

    name: str
    trt: Any
    version: str
    log: Any
    lines: deque[tuple[bool, str]]
    plugin_errors: list[str]

    def errors(self) -> str:
        """What went wrong since `clear`, in one line: our plugins' errors, TensorRT's, or its warnings.

        Where several threads run engines it may hold another one's errors too.
        """
        lines = self.lines.copy()  # other threads log meanwhile
        errors = list(self.plugin_errors) or [text for is_error, text in lines if is_error]
        told = list(dict.fromkeys(errors or [text for _, text in lines]))
        # every failing call without a GPU adds one of these
        told = [text for text in told if NO_DRIVER not in text] or told
        return "; ".join(told) or "it logged nothing"

    def clear(self) -> None:
        """Forgets what was logged."""
        self.lines.clear()
        self.plugin_errors.clear()


@functools.cache
def load_flavor(name: str) -> Flavor:
    """Imports a flavor.

    Args:
        name: `tensorrt` or `tensorrt-rtx`.

    Raises:
        BackendUnavailableError: when it cannot be imported, or is older than 10.
    """
    # find_spec proves nothing: the bindings are there without the library in some installations.
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
            logger.debug("%s", text)  # what matters of it comes back in our exceptions

    return Log()
