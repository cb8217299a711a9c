"""What is released: the sdist is the repository, the wheel one package; their tests pass elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from install_wheel import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
DATA = {".cu", ".h", ".jinja", ".js", ".css"}  # what is read beside the modules
# Every command, video, the kernels' sources, all modules; `make test-wheel` runs the whole suite.
SUBSET = ("test_api.py", "test_layout.py", "test_structures.py")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that tests/install_wheel.py fills."""
    if not os.access(ROOT, os.W_OK):
        pytest.skip(f"{ROOT} cannot be written, as building does")
    folder = tmp_path_factory.mktemp("released")
    script = Path(__file__).with_name("install_wheel.py")
    subprocess.run([sys.executable, script, folder], check=True)
    return folder


def test_wheel_is_one_package_with_its_data(released: Path) -> None:
    (wheel,) = (released / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"comask"}
    data = {
        f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder)}"
        for package, folder in SETUPTOOLS["package-dir"].items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in DATA
    }
    assert {Path(name).suffix for name in data} == DATA
    assert {"comask/py.typed", *data} <= names


def test_sdist_is_what_git_has(released: Path) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    (sdist,) = (released / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in found if name.startswith("comask.egg-info/")}
    there = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert found - made - {"PKG-INFO", "setup.cfg"} == there


def test_metadata(released: Path) -> None:
    (wheel,) = (released / "dist").glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (file,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(file).decode().splitlines()
    assert f"Version: {PROJECT['version']}" in lines
    assert f"Requires-Python: {PROJECT['requires-python']}" in lines
    assert {
        line.removeprefix("Provides-Extra: ") for line in lines if "Provides-Extra" in line
    } == set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_wheel_passes_the_sdists_tests_outside_the_checkout(released: Path, tmp_path: Path) -> None:
    python, source = released / "venv" / "bin" / "python", released / "source"
    code = "import comask, comask.export, sys; print(comask.__file__, comask.export.__file__)"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    files = where.stdout.split()
    assert len(files) == 2, where.stderr
    assert all(Path(file).is_relative_to(released / "venv") for file in files), files
    for script in PROJECT["scripts"]:
        command = [python.with_name(script), "--version"]
        told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert PROJECT["version"] in told.stdout, told.stderr
    tests = [source / "tests" / name for name in SUBSET]
    command = [python, "-m", "pytest", "-q", "-c", source / "pyproject.toml", *tests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
