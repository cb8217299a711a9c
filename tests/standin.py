"""Runs tests in processes whose CUDA driver and decoder are standin_cuda.c and standin_nvcuvid.c."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from comask.kernels import compile

HERE = Path(__file__).parent
# pycuda names functions that the stand-in lacks: bound lazily, they do no harm until one is called
BOOT = """
import importlib, json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
module, function, arguments = sys.argv[1:]
getattr(importlib.import_module(module), function)(*json.loads(arguments))
"""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Holds the compiled stand-ins as long as this process lives."""
    folder = tempfile.TemporaryDirectory(prefix="comask-standin-")
    driver = Path(folder.name) / "libcuda.so.1"
    for source, library, needs in (
        ("standin_cuda.c", driver, "-ldl"),
        ("standin_nvcuvid.c", driver.with_name("libnvcuvid.so.1"), driver),
    ):
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-z,nodelete",
             f"-Wl,-soname,{library.name}", HERE / source, "-o", library, needs],
            check=True,
        )  # fmt: skip
    return folder


@functools.cache
def _kernels() -> str:
    """All kernels' CPU builds, which the stand-in runs."""
    sources = sorted(path.stem for path in compile.FOLDER.glob("*.cu"))
    return ":".join(compile.host_library(source)._name for source in sources)


def skip_without_pycuda() -> None:
    """Skips the calling module where pycuda could not be built, saying why."""
    if importlib.util.find_spec("pycuda") is None:
        report = Path(sys.prefix) / "pycuda"  # by tests/install_pycuda.py
        why = report.read_text().strip() if report.exists() else "pycuda is missing: `make test`"
        pytest.skip(why, allow_module_level=True)


def run_on_standin(function: Callable[..., None], *arguments: object, **environment: str) -> str:
    """Calls a test module's function in a process of its own, with the stand-in as its driver.

    Args:
        function: of a module in this folder.
        arguments: as JSON has them, or paths.
        environment: more variables.

    Returns:
        what it printed.
    """
    module = function.__module__.rpartition(".")[2]  # pytest may prefix it with the folder's name
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", BOOT, module, function.__name__,
         json.dumps(arguments, default=str)],
        env=os.environ | {
            "LD_LIBRARY_PATH": f"{_folder().name}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "PYTHONPATH": str(HERE),
            "STANDIN_KERNELS": _kernels(),
        } | environment,
        cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PyCUDA" not in done.stderr, done.stderr  # its complaints at clean-up are no exceptions
    assert "could not be cleaned up" not in done.stderr, done.stderr
    return done.stdout


class Counts(ctypes.Structure):
    """`standin_counts` of standin_cuda.c."""

    _fields_ = [
        (name, ctypes.c_long)
        for name in (
            "device_allocations", "device_live", "device_bytes", "host_allocations", "host_live",
            "streams_live", "events_live", "contexts_retained", "contexts_current", "hasty_frees",
            "graphs_live", "graph_launches", "contexts_destroyed", "planes_fetched",
        )
    ]  # fmt: skip


def counts() -> Counts:
    """Those of this process, which change as it goes on."""
    return Counts.in_dll(ctypes.CDLL("libcuda.so.1"), "standin_counts")


def live() -> dict[str, int]:
    """What is held now, without zeros and the retained context."""
    held = (
        "device_live",
        "device_bytes",
        "host_live",
        "streams_live",
        "events_live",
        "graphs_live",
    )
    found = {name: getattr(counts(), name) for name in (*held, "contexts_current", "hasty_frees")}
    return {name: number for name, number in found.items() if number}
