"""Uses wheels that were uploaded with the tree; needs no network."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TIMEOUT = 600  # seconds; a source distribution of pycuda compiles for minutes


def use(folders: Sequence[Path], site: Path) -> None:
    """Unpacks those packages that this Python lacks, and lets this process and its children find them.

    Args:
        folders: the folders that hold wheels, and source distributions of what has no wheel.
        site: the folder for the unpacked packages.
    """
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    missing = [file for file in files if not _is_there(file)]
    if not missing:
        return
    start = time.monotonic()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-compile"]

    def unpack(these: Sequence[Path]) -> str:
        command = [*pip, *offline, "--target", str(site), *map(str, these)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"pip took more than {TIMEOUT} s"
        return done.stderr.strip() or "pip failed" if done.returncode else ""

    if unpack(missing):  # a wheel for another Python must not spoil the others
        for file in missing:
            if problem := unpack([file]):
                print(f"{file.name} cannot be used: {problem}", flush=True)
    print(
        f"{len(missing)} uploaded packages unpacked in {time.monotonic() - start:.0f} s\n",
        flush=True,
    )
    sys.path.append(str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], str(site)])


def _is_there(file: Path) -> bool:
    name = re.split(r"-\d", file.name)[0].replace("_", "-")
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
