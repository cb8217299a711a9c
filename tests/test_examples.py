"""Examples that no other test runs."""

from __future__ import annotations

import csv
import importlib.util
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import standin_dali
import standin_pynvvideocodec
from click.testing import CliRunner
from PIL import Image
from standin import live, run_on_standin, skip_without_pycuda
from standin_engines import write_engines
from video_clips import decoded, make_clip, pictures

from comask.data.shapes import ShapesSource
from comask.evaluate import METRICS
from comask.kernels.launch import Matrix
from comask.presets import PRESETS
from comask.runtime import Detections, Predictor

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, *arguments: object) -> None:
    """Runs it in this process, as a shell would."""
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before


def line(name: object, found: Detections) -> str:
    return f"{name}: {len(found)} instances, best score {found.scores.max():.4f}"


def test_tables_are_written_beside_the_papers_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("tables", EXAMPLES / "reproduce_tables.py")
    assert spec
    assert spec.loader
    tables = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tables", tables)
    spec.loader.exec_module(tables)
    commands: list[list[str]] = []

    def trained(command: list[str], *, check: bool) -> None:
        assert check
        commands.append(command)
        output = Path(command[command.index("--output") + 1])
        output.mkdir(parents=True, exist_ok=True)
        with (output / "eval.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "epoch", "stage", "task", *METRICS])
            for stage in ("final", "first"):
                for task, ap in (("bbox", 0.9), ("segm", 0.333 if stage == "final" else 0.1)):
                    writer.writerow([9, 1, stage, task, *[ap] * len(METRICS)])

    monkeypatch.setattr(subprocess, "run", trained)
    arguments = ["/data/coco", str(tmp_path), "--processes", "4", "--set", "train.batch_size=16"]
    result = CliRunner().invoke(tables.main, arguments)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "tables.md").read_text().splitlines()[4:]
    assert len(lines) == len(tables.ROWS) == 7
    assert "| 1 | CoMask, ResNet-50 | 33.3 / 37.7 |" in lines[0]
    assert {row.preset for row in tables.ROWS} <= set(PRESETS)
    for command in commands:
        assert "--nproc-per-node=4" in command
        assert command[-2:] == ["--set", "train.batch_size=16"]
        assert "--resume" in command


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "a.mp4", pictures(14, 96, 128), audio=None)


def lines_of_clip(bundle: Path, clip: Path, matrix: Matrix, full_range: bool) -> list[str]:
    """Returns the example's lines for the frames of a clip, given as pairs of planes."""
    found = []
    with Predictor.load(bundle, "onnxruntime") as predictor, predictor.stream() as session:
        for i, frame in enumerate(decoded(clip)):
            luma, chroma = np.split(frame.reformat(format="nv12").to_ndarray(), [frame.height])
            future = session.submit(
                (luma, chroma), format="nv12", matrix=matrix, full_range=full_range
            )
            found.append(line(f"frame {i}", future.result()))
    assert len({text.partition(":")[2] for text in found}) > len(found) // 2  # frames tell apart
    return found


def test_frames_of_pynvvideocodec_on_the_host(
    micro_bundle: Path,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", standin_pynvvideocodec)
    expected = lines_of_clip(micro_bundle, clip, "bt601", True)
    run_example(
        "pynvvideocodec_pipeline.py", micro_bundle, clip, "--backend", "onnxruntime",
        "--matrix", "bt601", "--full-range",
    )  # fmt: skip
    assert capsys.readouterr().out.splitlines() == expected


def decoded_by_pynvvideocodec(folder: str, clip: str, eager: bool) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    sys.modules["PyNvVideoCodec"] = standin_pynvvideocodec
    standin_pynvvideocodec.eager = eager
    for frames in ((), ("--frames", 5)):
        run_example("pynvvideocodec_pipeline.py", folder, clip, "--backend", "tensorrt", *frames)
    assert standin_tensorrt.failures == []
    assert live() == {}


@pytest.mark.parametrize("eager", [False, True], ids=["decoder late", "decoder early"])
def test_frames_of_pynvvideocodec_on_the_gpu(micro_bundle: Path, clip: Path, eager: bool) -> None:
    skip_without_pycuda()
    bundle = shutil.copytree(micro_bundle, clip.parent / "bundle")
    expected = lines_of_clip(bundle, clip, "bt709", False)
    out = run_on_standin(decoded_by_pynvvideocodec, bundle, clip, eager)
    assert out.splitlines() == expected + expected[:5]


@pytest.mark.parametrize("dali", ["stand-in", "NVIDIA's"])
def test_images_of_dali(
    micro_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dali: str,
) -> None:
    if dali == "stand-in":
        for name, module in standin_dali.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    else:
        pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")
    source = ShapesSource(num_images=20, seed=11)
    files = [tmp_path / f"{i}.png" for i in range(11)]  # the last batch is not full
    for i, file in enumerate(files):
        Image.fromarray(np.resize(source.image(i), (64 + 8 * i, 96, 3))).save(file)
    with Predictor.load(micro_bundle, "onnxruntime") as predictor:
        expected = [line(file, predictor(file)) for file in files]
    run_example("dali_pipeline.py", micro_bundle, tmp_path, "--backend", "onnxruntime")
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(expected)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help_needs_no_package_of_others(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("nvidia.dali", "PyNvVideoCodec"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(SystemExit) as ended:
        run_example(name, "--help")
    assert ended.value.code == 0
    assert name in capsys.readouterr().out.partition("\n")[0]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("contact_sheet.py", ["sheet.png"]),
        ("dali_pipeline.py", ["."]),
        ("pyav_pipeline.py", ["a.mp4"]),
        ("pynvvideocodec_pipeline.py", ["a.mp4"]),
        ("torch_pipeline.py", []),
    ],
)
def test_errors_are_one_line(name: str, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_example(name, "nobundle", *arguments)
    assert str(ended.value.code).startswith("error: nobundle: no bundle here: no such folder")


@pytest.mark.parametrize(
    ("name", "package", "wheel", "options"),
    [
        ("dali_pipeline.py", "nvidia.dali", "nvidia-dali-cuda130", ["--backend", "onnxruntime"]),
        (
            "pynvvideocodec_pipeline.py",
            "PyNvVideoCodec",
            "pynvvideocodec",
            ["--backend", "onnxruntime"],
        ),
        ("triton_client.py", "tritonclient", "'tritonclient[http]'", []),
    ],
)
def test_missing_packages_are_named(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, package: str, wheel: str, options: list[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        run_example(name, micro_bundle, tmp_path, *options)
    assert str(ended.value.code).startswith("error: ")
    assert str(ended.value.code).endswith(f": pip install {wheel}")
