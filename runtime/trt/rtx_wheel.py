"""A gap in TensorRT-RTX's wheel that ends the process, and how to close it.

The ONNX parser adds a plugin layer by `dlopen("libtensorrt_rtx.so")`, but the wheel holds that library as
`libtensorrt_rtx.so.1` alone (seen in 1.7.1). The parser then calls `std::terminate`, which nothing in the
process can catch. A folder with a link of the missing name, on LD_LIBRARY_PATH when a process starts,
is enough; builds run in a process of their own, so they can be given one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

LIBRARY = "libtensorrt_rtx.so"


def wheel_library() -> Path | None:
    """The wheel's library where its unversioned name is missing; None where nothing is."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return None  # installed some other way, with the system's linker in charge
    folder = Path(spec.origin).parent
    if (folder / LIBRARY).exists():  # the parser looks beside itself
        return None
    versioned = sorted(folder.glob(f"{LIBRARY}.*"))
    if not versioned or _loads(LIBRARY):
        return None
    return versioned[-1]


def search_path(folder: Path) -> str | None:
    """The LD_LIBRARY_PATH under which a new process parses plugins; None where it does anyway.

    Args:
        folder: an existing one; gets the missing link.
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
