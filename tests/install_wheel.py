"""Builds sdist and wheel, and installs the wheel away from the checkout: `install_wheel.py FOLDER`.

FOLDER gets `dist/`, the unpacked sdist as `source/`, and `venv/`: the wheel, and this interpreter's
packages for all that it depends on. An editable install among those is not seen, since a .pth file in a
folder that is itself on the path by one does nothing.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path) -> Path:
    """The sdist, and the wheel that is made of it, in `folder`; the wheel's path."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(sdist: Path, folder: Path) -> None:
    """The sdist's content in `folder`, without the name and version that all its paths begin with."""
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            _, _, member.name = member.name.partition("/")
            archive.extract(member, folder, filter="data")


def make_venv(folder: Path, *also: Path) -> Path:
    """A venv without pip, which sees the packages of the folders `also` too; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages(folder) / "also.pth").write_text("".join(f"{path}\n" for path in also))
    return folder / "bin" / "python"


def site_packages(venv: Path) -> Path:
    """Where it has its packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)}))


def install(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Installs into the venv of `python` by this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    wheel = build(target / "dist")
    (sdist,) = (target / "dist").glob("*.tar.gz")
    unpack(sdist, target / "source")
    interpreter = make_venv(target / "venv", site_packages(Path(sys.prefix)))
    done = install(interpreter, "--no-deps", "--no-index", wheel)
    sys.exit(done.stdout if done.returncode else None)
