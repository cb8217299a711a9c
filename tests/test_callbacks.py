"""What callbacks are told, and what trackers get."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import MICRO, run, settings

from comask.config import Config
from comask.errors import ConfigError
from comask.evaluate import TASKS, CocoMetrics
from comask.presets import preset
from comask.training import Callback, train
from comask.training.callbacks import TensorBoard, open_trackers
from comask.training.record import Step
from comask.training.validation import Validation

TINY = dict(setting.split("=") for setting in MICRO)


def metrics(box: float, mask: float) -> CocoMetrics:
    values = {task: {"AP": ap} for task, ap in zip(TASKS, (box, mask), strict=True)}
    return CocoMetrics(values=values, per_class={}, images=1, detections=1, max_detections=100)


class Recorder(Callback):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_start(self, folder: Path, config: Config, step: int) -> None:
        self.calls.append(("start", folder.name, config.train.epochs, step))

    def on_step(self, step: Step) -> None:
        self.calls.append(("step", step.step))

    def on_evaluation(self, step: int, epoch: int, validation: Validation) -> None:
        self.calls.append(("evaluation", step, epoch, sorted(validation.stages)))

    def on_end(self, folder: Path) -> None:
        self.calls.append(("end", (folder / "checkpoint-last.pt").exists()))


def test_callbacks_are_told_everything_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    result = train(
        "shapes", tmp_path / "run", preset="shapes-tiny", settings=TINY, callbacks=[recorder]
    )
    expected = [
        ("start", "run", 1, 0), ("step", 1), ("step", 2),
        ("evaluation", 2, 0, ["final", "first", "plain"]), ("end", True),
    ]  # fmt: skip
    assert recorder.calls == expected
    assert (result.step, result.config.model.channels) == (2, 32)
    assert result.best.is_file()
    assert result.last.is_file()
    assert result.validation is not None
    again = Recorder()
    resumed = train(
        "shapes", tmp_path / "run", preset="shapes-tiny", settings=TINY, resume=True,
        callbacks=[again],
    )  # fmt: skip
    assert (again.calls, resumed.step) == ([("start", "run", 1, 2), ("end", True)], 2)


def test_an_exception_of_a_callback_ends_the_run(tmp_path: Path) -> None:
    class Impatient(Callback):
        ended = False

        def on_step(self, step: Step) -> None:
            raise RuntimeError("enough")

        def on_end(self, folder: Path) -> None:
            type(self).ended = True

    with pytest.raises(RuntimeError, match="enough"):
        train(
            "shapes", tmp_path / "run", preset="shapes-tiny", settings=TINY, callbacks=[Impatient()]
        )
    assert Impatient.ended


def test_tensorboard_gets_the_numbers_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar: object) -> None:
            calls.append(scalar)

        def close(self) -> None:
            calls.append(("closed",))

    board = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    tracker = TensorBoard()
    tracker.on_start(tmp_path, preset("shapes-tiny"), 3)
    tracker.on_step(Step(step=4, epoch=0, rate=0.1, losses={"mask": 2.0, "box": 1.0}))
    tracker.on_evaluation(4, 0, Validation(final=metrics(0.5, 0.4), first=metrics(-1.0, 0.3)))
    tracker.on_end(tmp_path)
    assert calls == [
        (str(tmp_path / "tensorboard"), 4),
        ("train/lr", 0.1, 4), ("train/loss", 3.0, 4),
        ("train/loss_mask", 2.0, 4), ("train/loss_box", 1.0, 4),
        ("validation/bbox_AP_final", 0.5, 4), ("validation/segm_AP_final", 0.4, 4),
        ("validation/segm_AP_first", 0.3, 4),
        ("closed",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")],
)
def test_a_missing_tracker_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # its import fails
    with pytest.raises(ConfigError, match=rf"pip install 'comask\[{name}\]'"):
        open_trackers([name])
    result = run("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run",
                 "--track", name, *settings(*MICRO))  # fmt: skip
    assert result.exit_code == 1
    assert f"--track {name}: the package {name} is not installed" in result.output
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_wandb_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'comask[wandb]'")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    arguments = ("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run",
                 "--track", "wandb", *settings(*MICRO))  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    id_ = (tmp_path / "run" / "wandb_id.txt").read_text()
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(id_)
    content = b"".join(file.read_bytes() for file in folder.glob("*.wandb"))
    for word in (b"train/loss_mask", b"validation/segm_AP_final", b"short_side"):
        assert word in content
    assert run(*arguments, "--resume", *settings("train.epochs=2")).exit_code == 0
    assert (tmp_path / "run" / "wandb_id.txt").read_text() == id_


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'comask[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    arguments = ("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run",
                 "--track", "mlflow", *settings(*MICRO))  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert run(*arguments, "--resume", *settings("train.epochs=2")).exit_code == 0
    id_ = (tmp_path / "run" / "mlflow_id.txt").read_text()
    logged = mlflow.get_run(id_)
    assert logged.info.status == "FINISHED"
    assert logged.data.params["preprocess.short_side"] == "96"
    history = mlflow.MlflowClient().get_metric_history(id_, "train/loss")
    assert [entry.step for entry in history] == [1, 2, 3, 4]
    assert "validation/segm_AP_final" in logged.data.metrics


def test_settings_of_a_file(tmp_path: Path) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(
        "train:\n  epochs: 3\n  batch_size: auto\n  learning_rate: 1e-4\n"
        "data:\n  short_sides: [64, 96]\n"
    )
    shown = run("train", "--preset", "shapes-tiny", "--config", yaml, "--print-config",
                *settings("train.epochs=5"))  # fmt: skip
    assert shown.exit_code == 0, shown.output
    config = json.loads(shown.output)
    assert (config["train"]["epochs"], config["train"]["batch_size"]) == (5, 0)
    assert config["train"]["learning_rate"] == 1e-4  # which YAML 1.1 reads as text
    assert config["data"]["short_sides"] == [64, 96]
    assert config["model"]["channels"] == 64  # the preset's
    whole = tmp_path / "config.json"
    whole.write_text(shown.output)
    again = run("train", "--config", whole, "--print-config")
    assert json.loads(again.output) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {epoch: 3}", "unknown setting train.epoch: did you mean train.epochs?"),
        ("train: 3", "expected the parts model, preprocess, data, train"),
        ("[1]", "expected the parts"),
        ("train: {epochs: many}", "train.epochs: expected a value of type int, got 'many'"),
        ("train: {learning_rate: fast}", "train.learning_rate: expected a value of type float"),
        ("train: [", "cannot be read"),
        ("data: {short_sides: [9000]}", "data.short_sides: expected sides of at most"),
    ],
)
def test_a_wrong_file_of_settings_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    result = run("train", "--config", tmp_path / "c.yaml", "--print-config")
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert words in result.output
    assert "c.yaml" in result.output
