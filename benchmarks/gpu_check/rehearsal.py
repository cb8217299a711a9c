"""Prepares a rehearsal: compiles the stand-ins of `tests` for the driver and the video decoder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from places import TESTS, paths


def stand_in_environment(folder: Path) -> Mapping[str, str]:
    """Returns the variables with which a process takes the stand-in for the NVIDIA driver.

    Args:
        folder: an existing folder for the compiled driver.

    Raises:
        RuntimeError: if it cannot be compiled.
    """
    from comask.kernels import compile

    driver = folder / "libcuda.so.1"
    for source, library, needs in (
        ("standin_host.c", driver, "-ldl"),
        ("standin_nvcuvid.c", driver.with_name("libnvcuvid.so.1"), str(driver)),
    ):
        if not library.exists():
            _compile(TESTS / source, library, needs)
    sources = sorted(path.stem for path in compile.FOLDER.glob("*.cu"))
    kernels = [compile.host_library(source)._name for source in sources]
    old = os.environ.get("LD_LIBRARY_PATH")
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), old])),
        "STANDIN_KERNELS": ":".join(kernels),
        **paths(TESTS),
    }


def _compile(source: Path, library: Path, needs: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-Wl,-z,nodelete", f"-Wl,-soname,{library.name}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(library), needs], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{source.name} cannot be compiled: {done.stderr}")
