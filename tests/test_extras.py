"""Each task runs with the extras it needs and no others, and names the one it lacks.

Installs from the package index, into a folder of this environment that is kept until the requirements
change. A layer sees the packages of those below it.
"""

from __future__ import annotations

import email
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import doc_blocks
import pytest
from conftest import COMMANDS
from install_wheel import ROOT, build, install, make_venv, site_packages
from packaging.requirements import Requirement
from video_clips import make_clip, pictures

from comask.runtime.trt.flavor import PACKAGES

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


ONNXRUNTIMES = {"onnxruntime", "onnxruntime-gpu"}  # one module, of which an environment has one


@pytest.fixture(scope="module")
def brought(wheel: Path) -> Callable[..., dict[str, Requirement]]:
    """What the wheel with some extras depends on, by name, as its metadata say."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    lines = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    known = set(metadata.get_all("Provides-Extra", []))

    def call(*extras: str) -> dict[str, Requirement]:
        assert known.issuperset(extras)
        found = {}
        for extra in ("", *extras):
            for line in lines:
                if line.marker is None or line.marker.evaluate({"extra": extra}):
                    inner = call(*line.extras) if line.name == "comask" else {line.name: line}
                    found.update(inner)
        return found

    return call


@pytest.mark.parametrize(
    ("extras", "expected"),
    [
        (("ort",), {"onnxruntime"}),
        (("gpu",), {"onnxruntime-gpu"}),
        (("export",), set()),
        (("train", "export", "video", "jobs", "heif", "track", "tensorboard", "docs"), set()),
        (("export", "gpu"), {"onnxruntime-gpu"}),
        (("dev",), {"onnxruntime"}),
    ],
)
def test_which_onnxruntime_the_extras_bring(
    brought: Any, extras: tuple[str, ...], expected: set[str]
) -> None:
    assert ONNXRUNTIMES & set(brought(*extras)) == expected


def test_a_gpu_gets_all_that_it_needs(brought: Any) -> None:
    packages = brought("gpu")
    assert {PACKAGES["tensorrt"], "pycuda", "cuda-bindings", "nvidia-cuda-nvrtc"} <= set(packages)
    assert packages["onnxruntime-gpu"].extras == {"cuda", "cudnn"}  # CUDA's libraries, from pip
    assert set(brought("ort")) - ONNXRUNTIMES <= set(packages)
    assert not packages["onnxruntime-gpu"].specifier.contains("1.20.2")  # has no preload_dlls


def installations() -> list[tuple[str, tuple[str, ...]]]:
    """Where a page, or the image, installs comask, and with which extras."""
    found = []
    for page in doc_blocks.PAGES:
        for block in doc_blocks.blocks(page):
            for extras in re.findall(r"pip install .*?(?:\.|comask)\[([\w,-]+)\]", block.text):
                found.append((str(block), tuple(extras.split(","))))
    for extras in re.findall(r"^ARG EXTRAS=(.+)$", (ROOT / "Dockerfile").read_text(), re.M):
        found.append(("Dockerfile", tuple(extras.split(","))))
    return found


@pytest.mark.parametrize(("place", "extras"), installations())
def test_every_line_that_installs_brings_one_onnxruntime(
    brought: Any, place: str, extras: tuple[str, ...]
) -> None:
    found = ONNXRUNTIMES & set(brought(*extras))
    assert len(found) == 1, f"{place}: {extras} bring {found}"


WITHOUT_ONNXRUNTIME = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "onnxruntime" else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from comask.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "export a precision", "quantize"])
def test_what_exports_asks_for_onnxruntime_first(
    command: str, micro_run: Path, micro_bundle: Path, micro_fp16: Path, tmp_path: Path
) -> None:
    words = {
        "export": ("export", micro_run / "checkpoint-best.pt", "--output", tmp_path / "new"),
        "export a precision": ("export", micro_bundle, "--precision", "fp16"),
        "quantize": ("quantize", micro_fp16, "--calib-data", "shapes", "--limit", 1),
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ONNXRUNTIME, *map(str, words)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: the onnxruntime backend cannot be imported (No module named 'onnx"
    )
    assert last.endswith("pip install 'comask[ort]' on a CPU, or 'comask[gpu]' on a GPU")
    assert "exporting" not in done.stderr  # nor PyTorch's AP measured, which a bar would show
    assert "images" not in done.stderr


def real_gpu_folder(wheel: Path, folder: Path) -> Path:
    """An environment with the real onnxruntime-gpu, beside CUDA's packages of this one."""
    python = make_venv(folder, site_packages(Path(sys.prefix)))
    done = install(python, "--no-deps", "--no-cache-dir", "onnxruntime-gpu>=1.28")
    if done.returncode:
        pytest.skip(f"no onnxruntime-gpu: {done.stdout[-300:]}")
    done = install(python, "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stdout
    return python


@pytest.mark.slow
def test_the_real_cuda_provider_finds_the_libraries_that_pip_installed(
    wheel: Path, micro_bundle: Path, tmp_path: Path
) -> None:
    """Without a driver, its library is all that is missing; it is linked after those of CUDA."""
    nvidia = site_packages(Path(sys.prefix)) / "nvidia"
    if not (nvidia / "cu13").exists():
        pytest.skip("there are no packages of CUDA 13; PyTorch's build for CUDA brings them")
    python = real_gpu_folder(wheel, tmp_path / "venv")
    (site_packages(tmp_path / "venv") / "nvidia").symlink_to(nvidia)
    code = (
        "import logging, sys; from pathlib import Path; logging.basicConfig()\n"
        "from comask.runtime.backends.ort import OrtSession\n"
        "print(OrtSession(Path(sys.argv[1])).provider)"
    )
    done = subprocess.run(
        [python, "-c", code, micro_bundle / "stage2_roi_head.onnx"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    shutil.rmtree(tmp_path / "venv")  # half a gigabyte
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != "CUDAExecutionProvider":
        warning = next(line for line in done.stderr.splitlines() if line.startswith("WARNING"))
        assert "does not start: libcuda.so.1: cannot open shared object file" in warning
