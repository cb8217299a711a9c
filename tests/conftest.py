"""Fixtures: one tiny run and its bundle, made by the commands themselves and shared by all tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import click
import exports
import hypothesis
import pytest
from click.testing import CliRunner, Result

import comask.cli.main
from comask.runtime import Predictor

# Examples take long where a network runs; the machine's speed is not what is tested. They are the
# same in every run, so that a change is judged by what it changed; `--hypothesis-profile search`
# draws new ones and more of them, and what it finds is kept as an `@example`.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("default")
hypothesis.settings.register_profile("search", deadline=None, max_examples=300, derandomize=False)

COMMANDS: dict[str, click.Command] = {
    name: command
    for name in comask.cli.main.MODULES
    if (command := comask.cli.main.main.get_command(click.Context(comask.cli.main.main), name))
}
# shapes-tiny, slimmer still: what is tested is the path, not the accuracy
MICRO = (
    "model.channels=32",
    "model.head_channels=32",
    "model.head_convs=2",
    "model.classifier_width=64",
    "model.detections=16",
    "data.shapes_train=8",
    "data.shapes_val=4",
    "train.batch_size=4",
    "train.epochs=1",
    "train.warmup_steps=1",
)


def pytest_configure() -> None:
    # Shells start what runs in the background with SIGINT ignored, and Python leaves that so.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-api", action="store_true", help="Write tests/api anew.")


def run(command: str, *arguments: object) -> Result:
    """Runs a command in this process, as a shell would."""
    return CliRunner().invoke(comask.cli.main.main, [command, *map(str, arguments)])


def settings(*assignments: str) -> list[str]:
    return [part for assignment in assignments for part in ("--set", assignment)]


@pytest.fixture(autouse=True)
def without_openvino_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands compare what they did before it was installed; tests/test_openvino.py tests the rest."""
    for module in ("parity.open_backends", "bench.latency"):
        monkeypatch.setattr(f"comask.runtime.{module}.openvino_backends", lambda bundle: [])


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two optimiser steps."""
    output = tmp_path_factory.mktemp("run") / "micro"
    result = run(
        "train", "--data", "shapes", "--preset", "shapes-tiny", "--output", output,
        *settings(*MICRO),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="session")
def micro_bundle(micro_run: Path) -> Path:
    """Its bundle, with every detection kept so that there are some to compare."""
    output = micro_run.parent / "bundle"
    result = run(
        "export", micro_run / "checkpoint-last.pt", "--output", output, "--score-threshold", "0",
        "--diagnostics", "--limit", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="session")
def framed_bundle(micro_run: Path) -> Path:
    """The same network, whose boxes are the second pass's, and whose masks lie over other boxes."""
    output = micro_run.parent / "framed"
    result = run(
        "export", micro_run / "checkpoint-last.pt", "--output", output, "--score-threshold", "0",
        "--limit", "1", *settings("model.second_boxes=true", "model.agreement_score=true"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="session")
def micro_fp16(micro_bundle: Path) -> Path:
    """A copy of it, to which the command added fp16 graphs."""
    folder = micro_bundle.parent / "bundle-fp16"
    shutil.copytree(micro_bundle, folder)
    result = run("export", folder, "--precision", "fp16,fp32", "--limit", "1")
    assert result.exit_code == 0, result.output
    assert "holds fp32 graphs already" in result.output
    assert "fp16 graphs agree with PyTorch" in result.output
    return folder


@pytest.fixture(scope="session")
def own_truth(micro_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_truth(micro_fp16, tmp_path_factory.mktemp("truth") / "data")


def write_own_truth(bundle: Path, data: Path) -> Path:
    """Writes images whose annotations are PyTorch's own detections: on them its AP is high, though it
    was hardly trained, and whoever differs from it loses AP."""
    assert run("shapes", data, "--count", 4, "--seed", 11).exit_code == 0
    file = data / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    content["annotations"] = []
    with Predictor.load(bundle, "torch") as predictor:
        for image in content["images"]:
            found = predictor(data / "images" / image["file_name"])
            for entry in found[:5].to_coco(image["id"]):
                _, _, w, h = entry["bbox"]
                content["annotations"].append(
                    entry | {"id": len(content["annotations"]) + 1, "area": w * h, "iscrowd": 0}
                )
    file.write_text(json.dumps(content))
    return data


def int8_arguments(bundle: Path, data: Path, *more: object) -> tuple[object, ...]:
    return (
        "quantize", bundle, "--calib-data", data, "--calib-limit", 3, "--data", data, "--skip-cpu",
        *more,
    )  # fmt: skip


@pytest.fixture(scope="session")
def int8_bundle(
    micro_fp16: Path, own_truth: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of `micro_fp16`, to which the command added int8 graphs."""
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    shutil.copytree(micro_fp16, folder)
    result = run(*int8_arguments(folder, own_truth, "--max-loss", 100))
    assert result.exit_code == 0, result.output
    assert "whether int8 is faster was not measured" in result.output
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images that are not part of the project."""
    folder = Path(
        os.environ.get("COMASK_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")
    )
    if not (folder / "coco_dev").is_dir():
        pytest.skip(f"no real images at {folder}; name their folder in COMASK_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set of tests/exports.py in COCO's form."""
    return exports.coco_set(tmp_path_factory.mktemp("coco") / "set")


@pytest.fixture(scope="session")
def coco_disjoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, in which no pixel belongs to two objects."""
    return exports.disjoint(exports.coco_set(tmp_path_factory.mktemp("disjoint") / "set"))
