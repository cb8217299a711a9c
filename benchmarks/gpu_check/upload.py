"""`make gpu-upload`: collects what a rented machine without a network needs, in parts of at most 64 MiB.

The machine is taken to have Python 3.12, torch, torchvision and what they bring, Triton, CuPy,
cuda-bindings and nvcc. The first part holds the tree, a trained bundle and the smallest wheels; the
others hold larger wheels. `make gpu-check` finds the parts in `build/gpu-upload`, and uses what is not
installed.

Packages come from pip's index. pycuda has no wheels: it is compiled here if there is such a Python and an
nvcc; otherwise its source is uploaded, and compiled on the machine, which takes minutes there.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from places import BUNDLE, COMMIT, ROOT, TESTS, UPLOADED, WHEELS

MIB = 2**20
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
PYCUDA_NEEDS = ("mako", "pytools", "platformdirs")
# Requirements of pyproject.toml that rows use. Those of a line stay together with what they require, and
# the first lines are needed most.
NEEDED = (
    ("pycocotools", "faster-coco-eval", "click", "rich", "safetensors"),
    ("onnxruntime",), ("av",), ("opencv-python-headless",), ("onnx", "onnxscript"),
    ("matplotlib",),
)  # fmt: skip
THERE = (
    "torch", "torchvision", "triton", "numpy", "pillow", "jinja2", "markupsafe", "typing-extensions",
    "sympy", "mpmath", "networkx", "fsspec", "filelock", "setuptools", "cuda-bindings", "cupy-cuda13x",
)  # fmt: skip
TREE = "tree.tar.gz"


class UploadError(Exception):
    """The files cannot be collected; the text says why."""


@dataclass(frozen=True)
class Item:
    """Files that belong together.

    Attributes:
        folder: their folder in a part; `.` for the part itself.
        files: the files.
    """

    folder: str
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return sum(file.stat().st_size for file in self.files)


def pack(items: Iterable[Item], limit: int) -> list[list[Item]]:
    """Puts each item into the first part that has room for it.

    Raises:
        UploadError: if an item is larger than the limit.
    """
    parts: list[list[Item]] = []
    for item in items:
        if item.size > limit:
            names = ", ".join(file.name for file in item.files)
            raise UploadError(
                f"{names}: {item.size / MIB:.1f} MiB, but a part has {limit / MIB:.1f} MiB; --limit "
                "gives it more, --there leaves out what the machine has"
            )
        fitting = (part for part in parts if sum(i.size for i in part) + item.size <= limit)
        part = next(fitting, None)
        if part is None:
            parts.append(part := [])
        part.append(item)
    return parts


def write(parts: Sequence[Sequence[Item]], output: Path) -> None:
    """Replaces the folder `output` by one with a folder for each part: 1, 2 and so on."""
    shutil.rmtree(output, ignore_errors=True)
    for number, part in enumerate(parts, start=1):
        for item in part:
            folder = output / str(number) / item.folder
            folder.mkdir(parents=True, exist_ok=True)
            for file in item.files:
                shutil.copy(file, folder)
        size = sum(item.size for item in part) / MIB
        names = sorted(file.name for item in part for file in item.files)
        print(f"{output / str(number)}: {size:.1f} MiB: {', '.join(names)}")


def tree(folder: Path) -> Item:
    """Returns the committed files as an archive, and the name of their commit."""
    archive, commit = folder / TREE, folder / COMMIT
    _run(["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"])
    commit.write_text(_run(["git", "-C", str(ROOT), "describe", "--always"]), encoding="utf-8")
    return Item(".", (archive, commit))


def bundle(folder: Path) -> Item:
    """Returns a bundle without its engines, which are for another GPU.

    Raises:
        UploadError: if the folder holds no bundle.
    """
    if not (folder / "manifest.json").is_file():
        raise UploadError(f"{folder}: there is no bundle here; `make demo` trains and exports one")
    return Item(BUNDLE, tuple(sorted(file for file in folder.iterdir() if file.is_file())))


def wheels(needed: Sequence[str], there: Iterable[str], folder: Path) -> Item:
    """Downloads wheels of packages and of what they require, without those that are there."""
    folder.mkdir()
    platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
    _pip(
        "download", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp",
        *platforms, f"--dest={folder}", *needed,
    )  # fmt: skip
    return Item(WHEELS, _without(there, folder))


def pycuda(interpreter: str, there: Iterable[str], folder: Path) -> Item:
    """Compiles pycuda, or downloads its source, with wheels of what it requires.

    Args:
        interpreter: a Python of the machine's version.
        there: what the machine has.
        folder: the folder for the files.
    """
    sys.path.append(str(TESTS))
    from install_pycuda import build_environment, toolkit

    others = wheels(PYCUDA_NEEDS, there, folder)
    (needed,), root, work = requirements(["pycuda"]), toolkit(), folder / "work"
    if root is None or not (root / "include" / "cuda.h").exists():
        missing = "nvcc with cuda.h beside it"
    else:
        missing = (
            "" if _can_compile(interpreter) else f"Python {PYTHON} with headers ({interpreter})"
        )
    if missing:
        print(f"pycuda is compiled on the machine, which takes minutes: there is no {missing} here")
        _pip("download", "--no-deps", "--no-binary=pycuda", f"--dest={folder}", needed)
    else:
        work.mkdir()
        assert root is not None
        environment = build_environment(work, root)
        _pip(
            "wheel", "--no-deps", f"--wheel-dir={folder}", needed, interpreter=interpreter,
            environment=environment,
        )  # fmt: skip
        shutil.rmtree(work)
    return Item(WHEELS, tuple(sorted({*others.files, *_without(there, folder)})))


def requirements(names: Iterable[str]) -> list[str]:
    """Returns what pyproject.toml says about the versions of these packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = itertools.chain(*project["optional-dependencies"].values())
    lines = [*project["dependencies"], *optional]
    starts = {name: (f"{name}>", f"{name}=", f"{name}<") for name in names}
    return [next(line for line in lines if line.startswith(start)) for start in starts.values()]


def _without(there: Iterable[str], folder: Path) -> tuple[Path, ...]:
    left_out = {name.lower() for name in there}
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return tuple(f for f in files if f.name.split("-")[0].lower().replace("_", "-") not in left_out)


def _can_compile(interpreter: str) -> bool:
    code = (
        "import os, sys, sysconfig; header = os.path.join(sysconfig.get_path('include'), 'Python.h'); "
        f"sys.exit('%d.%d' % sys.version_info[:2] != {PYTHON!r} or not os.path.exists(header))"
    )
    found = shutil.which(interpreter)
    return found is not None and subprocess.run([found, "-c", code]).returncode == 0


def _pip(
    *arguments: str, interpreter: str = sys.executable, environment: dict[str, str] | None = None
) -> None:
    quiet = ("--quiet", "--disable-pip-version-check")
    _run([interpreter, "-m", "pip", arguments[0], *quiet, *arguments[1:]], environment or {})


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    everything = os.environ | (environment or {})
    done = subprocess.run(command, env=everything, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        words = (errors or done.stderr.splitlines() or ["no message"])[0]
        raise UploadError(f"{' '.join(command[:5])} …: {words}")
    return done.stdout


def main() -> None:
    """Collects the parts, or ends with an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=ROOT / "demo" / "bundle")
    parser.add_argument("--output", type=Path, default=UPLOADED)
    parser.add_argument("--interpreter", default=f"python{PYTHON}", help="which compiles pycuda")
    parser.add_argument(
        "--there", default="", help="further packages that the machine has, with commas"
    )
    parser.add_argument("--limit", type=float, default=64.0, help="MiB of a part [64]")
    options = parser.parse_args()
    there = {*THERE, *filter(None, options.there.split(","))}
    try:
        with tempfile.TemporaryDirectory(prefix="comask-gpu-upload-") as temporary:
            folder = Path(temporary)
            # where the tree itself travels with each part, as much of it is spent
            limit = int(options.limit * MIB) - _unpacked_size()
            items = [tree(folder), bundle(options.bundle)]
            pack(items, limit)  # before minutes are spent on the rest
            items.append(pycuda(options.interpreter, there, folder / "pycuda"))
            for place, names in enumerate(NEEDED):
                left = [name for name in names if name not in there]
                if left:
                    items.append(wheels(requirements(left), there, folder / str(place)))
            write(pack(items, limit), options.output)
    except UploadError as error:
        sys.exit(f"error: {error}")


def _unpacked_size() -> int:
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True
    ).stdout.split("\0")
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


if __name__ == "__main__":
    main()
