"""Builds pycuda into this environment where there may be no NVIDIA driver: `install_pycuda.py REPORT`.

Its extension module links to the driver's libcuda, so the tests' stand-in takes the driver's place, as
it does when they run; where there is a driver, that is the one that gets loaded. cuRAND, which we do not
use, is left out, since a toolkit may lack it. It takes a minute or two, and seconds once pip has the
wheel in its cache. REPORT gets one line: `ready`, or why the tests that need pycuda must be skipped.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).with_name("standin_cuda.c")


def requirement() -> str:
    """The version that pyproject.toml's `gpu` extra asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(r for r in project["optional-dependencies"]["gpu"] if r.startswith("pycuda"))


def toolkit() -> Path | None:
    """The CUDA toolkit's folder; asked of nvcc itself, for the one on PATH may be a wrapper."""
    if shutil.which("nvcc") is None:
        return None
    command = ["nvcc", "--dryrun", "-x", "cu", "-c", "/dev/null"]
    told = subprocess.run(command, capture_output=True, text=True).stderr
    folders = [line.partition("=")[2] for line in told.splitlines() if "_HERE_=" in line]
    return Path(folders[0]).parent if folders else None


def build_environment(folder: Path, root: Path) -> dict[str, str]:
    """Prepares a folder for a build of pycuda; gives the variables that the build needs."""
    soname = "-Wl,-soname,libcuda.so.1"
    library = folder / "libcuda.so"
    subprocess.run(["gcc", "-shared", "-fPIC", soname, SOURCE, "-o", library, "-ldl"], check=True)
    # pycuda's set-up reads its settings from the home folder
    settings = f"CUDA_ROOT = {str(root)!r}\nCUDA_ENABLE_CURAND = False\n"
    (folder / ".aksetup-defaults.py").write_text(settings)
    path = f"{root / 'bin'}:{os.environ['PATH']}"
    return {"HOME": str(folder), "LIBRARY_PATH": str(folder), "PATH": path}


def install() -> str:
    """Builds and installs it; says how that went."""
    if importlib.util.find_spec("pycuda") is not None:
        return "ready"
    root = toolkit()
    if root is None or not (root / "include" / "cuda.h").exists():
        return "pycuda is not built: there is no nvcc, or none with cuda.h beside it"
    missing = [compiler for compiler in ("gcc", "g++") if shutil.which(compiler) is None]
    if missing:
        return f"pycuda is not built: there is no {' and no '.join(missing)}"
    pip = [sys.executable, "-m", "pip"]
    cache = subprocess.run([*pip, "cache", "dir"], capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*pip, "install", "--quiet", requirement()],
            env=os.environ
            | build_environment(Path(folder), root)
            | ({"PIP_CACHE_DIR": cache} if cache else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode == 0:
        return "ready"
    errors = [line.strip() for line in done.stdout.splitlines() if "error" in line.lower()]
    return f"pycuda could not be built: {errors[0] if errors else done.stdout[-200:]}"


if __name__ == "__main__":
    outcome = install()
    Path(sys.argv[1]).write_text(outcome + "\n")
    print(f"pycuda: {outcome}")
