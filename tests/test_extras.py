"""Each task runs with the extras it needs and no others, and names the one it lacks.

Installs from the package index, into a folder of this environment that is kept until the requirements
change. A layer sees the packages of those below it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import COMMANDS
from install_wheel import ROOT, build, install, make_venv, site_packages
from video_clips import make_clip, pictures

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAYERS: dict[str, tuple[str, ...]] = {  # and what lies below
    "core": (),
    "ort": ("core",),
    "video": ("core", "ort"),
    "least": (),  # all three, in the least versions that pyproject.toml allows
}
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module", params=LAYERS)
def layer(request: pytest.FixtureRequest, wheel: Path) -> str:
    """Its name, when it and those below it are installed."""
    if request.param == "least" and sys.version_info[:2] != (3, 11):
        pytest.skip("the least versions have wheels for the least Python, 3.11")
    for name in (*LAYERS[request.param], request.param):
        _install(name, wheel)
    return str(request.param)


def _requirements(name: str) -> list[str]:
    if name == "least":
        allowed = [line for layer in ("core", "ort", "video") for line in _requirements(layer)]
        return [re.sub(r">=([\d.]+)", r"==\1.*", line) for line in allowed]
    found: list[str] = PROJECT["dependencies"]
    return found if name == "core" else PROJECT["optional-dependencies"][name]


def _folder(name: str) -> Path:
    below = [_requirements(layer) for layer in (*LAYERS[name], name)]
    digest = hashlib.sha256(json.dumps(below).encode()).hexdigest()[:12]
    return Path(sys.prefix) / "extras" / f"{name}-{digest}"


def _install(name: str, wheel: Path) -> None:
    folder, below = _folder(name), [site_packages(_folder(layer)) for layer in LAYERS[name]]
    if not (folder / "ready").exists():
        for old in folder.parent.glob(f"{name}-*"):
            shutil.rmtree(old)
        done = install(make_venv(folder, *below), *_requirements(name))
        if done.returncode:
            reachable = install(
                folder / "bin" / "python", "--dry-run", "--ignore-installed", "click"
            )
            if reachable.returncode:
                pytest.skip("no package index is reachable")
            pytest.fail(done.stdout[-2000:])
        (folder / "ready").touch()
    if not below:
        done = install(
            folder / "bin" / "python", "--no-deps", "--no-index", "--force-reinstall", wheel
        )
        assert done.returncode == 0, done.stdout


@pytest.fixture
def with_layer(layer: str, tmp_path: Path) -> Run:
    """Runs a command there: exit code and all that it says."""

    def call(name: str, *arguments: object) -> tuple[int, str]:
        code = "from comask.cli.main import main; main()"
        words = [str(_folder(layer) / "bin" / "python"), "-c", code, name, *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    return call


def only(*layers: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layer", layers, indirect=True)


@only("core")
@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_extra(with_layer: Run, name: str) -> None:
    code, said = with_layer(name, "--help")
    assert code == 0, said
    assert "Usage:" in said


@only("core")
def test_shapes_and_doctor_need_no_extra(
    with_layer: Run, tmp_path: Path, micro_bundle: Path
) -> None:
    code, said = with_layer("shapes", tmp_path / "shapes", "--count", 2)
    assert code == 0, said
    code, said = with_layer("doctor", micro_bundle)
    assert code == 0, said
    assert re.search(
        r"absent\s+onnxruntime: not installed\n\s*-> pip install 'comask\[ort\]'", said
    )


@only("core")
@pytest.mark.parametrize(
    ("name", "arguments", "extra"),
    [
        ("train", ("--data", "shapes", "--output", "run"), "train"),
        ("export", ("checkpoint.pt", "--output", "bundle"), "export"),
        ("export", ("BUNDLE", "--precision", "fp16"), "export"),
        ("infer", ("BUNDLE", "IMAGE", "--output", "results"), "ort"),
        (
            "eval",
            ("BUNDLE", "--data", "shapes", "--limit", "1"),
            "train",
        ),  # its reference is PyTorch
        ("eval", ("BUNDLE", "--data", "shapes", "--backend", "onnxruntime"), "ort"),
        ("bench", ("BUNDLE",), "ort"),
    ],
)
def test_what_lacks_an_extra_names_it(
    with_layer: Run, tmp_path: Path, micro_bundle: Path, name: str, arguments: tuple[str, ...],
    extra: str,
) -> None:  # fmt: skip
    (tmp_path / "checkpoint.pt").touch()
    with_layer("shapes", tmp_path / "shapes", "--count", 1)
    (image,) = (tmp_path / "shapes" / "images").iterdir()
    given = {"BUNDLE": shutil.copytree(micro_bundle, tmp_path / "copy"), "IMAGE": image}
    code, said = with_layer(name, *(given.get(word, word) for word in arguments))
    assert code == 1, said
    assert f"pip install 'comask[{extra}]'" in said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said


@only("ort", "least")
def test_onnxruntime_runs_judges_and_times_a_bundle(
    with_layer: Run, tmp_path: Path, micro_bundle: Path
) -> None:
    bundle, data = shutil.copytree(micro_bundle, tmp_path / "copy"), tmp_path / "shapes"
    assert with_layer("shapes", data, "--count", 2)[0] == 0
    code, said = with_layer("infer", bundle, data / "images", "--output", tmp_path / "results")
    assert code == 0, said
    assert "backend onnxruntime:fp32" in said
    assert len(list((tmp_path / "results").glob("*.overlay.png"))) == 2
    own = ("--results", tmp_path / "results" / "detections.json")
    code, said = with_layer(
        "eval", bundle, "--data", data, "--backend", "onnxruntime", *own, "--limit", 2
    )
    assert "Traceback" not in said
    assert code == 0, said
    code, said = with_layer("bench", bundle, "--backend", "onnxruntime", "--runs", 1)
    assert code == 0, said


@only("ort")
def test_a_video_names_the_extra_that_it_lacks(
    with_layer: Run, tmp_path: Path, micro_bundle: Path
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", pictures(2))
    code, said = with_layer("infer", micro_bundle, clip, "--output", tmp_path / "results")
    assert code == 1, said
    assert "pip install 'comask[video]'" in said
    assert "Traceback" not in said


@only("video", "least")
def test_videos_need_one_more(with_layer: Run, tmp_path: Path, micro_bundle: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", pictures(2))
    code, said = with_layer("infer", micro_bundle, clip, "--output", tmp_path / "results")
    assert code == 0, said
    names = {file.name for file in (tmp_path / "results").iterdir()}
    assert {"clip.mp4.overlay.mp4", "clip.mp4.jsonl"} <= names
    code, said = with_layer(
        "infer", micro_bundle, clip, "--track", "--output", tmp_path / "results"
    )
    assert code == 1, said
    assert "pip install 'comask[track]'" in said
