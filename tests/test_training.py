"""The loop: resuming, checkpoints and what a run writes."""

from __future__ import annotations

import csv
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MICRO, run, settings

from comask import progress
from comask.config import Config
from comask.config_reading import from_dict, override
from comask.data.coco import write_coco
from comask.data.loading import Batch
from comask.data.shapes import ShapesSource
from comask.errors import CheckpointError, ConfigError
from comask.files import locked
from comask.models.comask import CoMask
from comask.presets import preset
from comask.training import losses
from comask.training.checkpoint import load_checkpoint, model_from_checkpoint, save_checkpoint
from comask.training.distributed import Ranks
from comask.training.loop import Trainer
from comask.training.record import RunRecord, Step, read_rows
from comask.training.run import fit_to_machine


def train(output: Path, *extra: str) -> list[object]:
    return [
        "train", "--data", "shapes", "--preset", "shapes-tiny", "--output", output,
        *settings(*MICRO, "train.evaluate_every=0"), *extra,
    ]  # fmt: skip


def test_run_leaves_what_the_help_says(micro_run: Path) -> None:
    names = {path.name for path in micro_run.iterdir()}
    assert names == {
        "checkpoint-last.pt", "checkpoint-best.pt", "metrics.csv", "eval.csv", "config.json",
        "losses.png", "ap.png", "second_stage.png", "per_class.csv", "pictures", "report.html",
        "training_images.jpg", "analysis.json",
    }  # fmt: skip
    rows = read_rows(micro_run / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [1, 2]
    for row in rows:
        parts = [float(value) for key, value in row.items() if key.startswith("loss_")]
        assert float(row["loss"]) == sum(parts)
    evaluations = [(row["stage"], row["task"]) for row in read_rows(micro_run / "eval.csv")]
    assert evaluations == [(s, t) for s in ("final", "first", "plain") for t in ("bbox", "segm")]
    pictures = sorted(path.name for path in (micro_run / "pictures").iterdir())
    assert pictures[0] == "step-000002.png"
    assert pictures[1:] == [f"worst-{n}.jpg" for n in range(1, len(pictures))]


def test_resumed_run_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    longer = settings("train.epochs=2", "train.checkpoint_every=1")
    assert run(*train(whole, *longer)).exit_code == 0
    with monkeypatch.context() as patch:
        original = Trainer.train_step

        def interrupted(self: Trainer, batches: list[Batch], epoch: int, seconds: float) -> str:
            if self.step == 3:
                raise KeyboardInterrupt
            return original(self, batches, epoch, seconds)

        patch.setattr(Trainer, "train_step", interrupted)
        assert run(*train(stopped, *longer)).exit_code == 130
    # what was done after the last checkpoint is lost, and its rows with it
    with (stopped / "metrics.csv").open("a") as file:
        file.write("4,1,train,0,0,0,0,0,0,0,0,0\n")
    result = run(*train(stopped, *longer, "--resume"))
    assert result.exit_code == 0, result.output
    assert "going on from step 3 of 4\n" in result.output
    a, b = (load_checkpoint(folder / "checkpoint-last.pt") for folder in (whole, stopped))
    assert a.step == b.step == 4
    for name, weight in a.model.items():
        assert torch.equal(weight, b.model[name]), name
    rows = [read_rows(folder / "metrics.csv") for folder in (whole, stopped)]
    for row in rows[0] + rows[1]:
        assert 0 <= float(row.pop("data_seconds")) <= float(row.pop("seconds"))
    assert rows[0] == rows[1]
    assert [int(row["step"]) for row in rows[0]] == [1, 2, 3, 4]


def test_progress_says_what_is_left_once_it_can_tell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    now = iter(range(0, 10**6, 1000))  # seconds
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.Progress("training", 10, done=1) as bar:
        for _ in range(9):
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert all("left" not in line for line in lines[:4])
    assert lines[4] == "training: 6/10 steps, 0.0/s, 1 h 7 min left"
    assert lines[-1] == "training: 10/10 steps, 0.0/s, 2 h 30 min"
    assert [progress.duration(s) for s in (40, 725, 9287)] == ["40 s", "12 min", "2 h 35 min"]


def test_no_steps_write_the_untrained_network(tmp_path: Path) -> None:
    result = run(*train(tmp_path / "run", *settings("train.max_steps=0")))
    assert result.exit_code == 0, result.output
    model_from_checkpoint(load_checkpoint(tmp_path / "run" / "checkpoint-best.pt"))


def test_a_finished_run_is_not_overwritten(micro_run: Path) -> None:
    result = run(*train(micro_run))
    assert result.exit_code == 1
    assert "--resume" in result.output


def test_resume_refuses_another_model(micro_run: Path) -> None:
    result = run(*train(micro_run, "--resume", *settings("model.msfem_branches=1")))
    assert result.exit_code == 1
    assert "msfem_branches" in result.output


def test_non_finite_loss_stops_and_names_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comask.training import losses
    from comask.training.losses import Term

    nan = Term(torch.tensor(float("nan")), torch.tensor(1.0))
    monkeypatch.setattr(losses, "dense_box_loss", lambda *_: nan)
    result = run(*train(tmp_path / "run"))
    assert result.exit_code == 1
    kept = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert kept["step"] == 0
    assert len(kept["image_ids"]) == 4
    assert "not finite at step 0" in result.output
    assert "its images [" in result.output
    assert "Traceback" not in result.output


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def test_checkpoints_are_never_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"format": 1, "model": Malicious()}, path)
    with pytest.raises(CheckpointError, match="never run"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


def test_checkpoint_errors(tmp_path: Path, micro_run: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "text.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a comask checkpoint"):
        load_checkpoint(tmp_path / "other.pt")
    whole = (micro_run / "checkpoint-last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "cut.pt")


def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, micro_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(micro_run / "checkpoint-last.pt")
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()

    def fail(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, checkpoint)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_record_drops_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, keep_until=0)
    for step in range(1, 6):
        record.add_step(Step(step=step, epoch=0, rate=0.1, losses={"mask": 1 / 3}))
    RunRecord(tmp_path, keep_until=3)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["loss_mask"]) == 1 / 3


def test_accumulated_parts_give_the_gradient_of_their_mean(tmp_path: Path) -> None:
    """With the counts of all parts alike, two halves are one whole batch."""
    results = []
    for micro in (0, 2, 1):
        changes = settings(
            f"train.micro_batch={micro}", "train.max_steps=1", "model.backbone_norm=group"
        )
        assert run(*train(tmp_path / str(micro), *changes)).exit_code == 0
        results.append(read_rows(tmp_path / str(micro) / "metrics.csv")[0])
    for name in ("loss_rpn_objectness", "loss_class"):  # whose counts are fixed
        whole, halves, quarters = (float(row[name]) for row in results)
        assert halves == pytest.approx(whole, rel=1e-4)
        assert quarters == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("change", ["train.precision=bf16", "train.channels_last=true",
                                    "train.clip_norm=0.1", "train.ema_decay=0.9"])  # fmt: skip
def test_options_of_the_loop_train_and_export(tmp_path: Path, change: str) -> None:
    result = run(*train(tmp_path / "run", *settings(change)))
    assert result.exit_code == 0, result.output
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint-last.pt")
    assert (checkpoint.ema is not None) == change.startswith("train.ema")
    model = model_from_checkpoint(checkpoint)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, checkpoint.weights[name])
        assert torch.isfinite(weight).all()


def test_running_out_of_memory_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(losses.Objective, "forward", exhausted)
    result = run(*train(tmp_path / "run"))
    assert result.exit_code == 1
    assert "train.micro_batch=2" in result.output


def test_what_the_machine_cannot_do_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = run(*train(tmp_path / "run", *settings("train.precision=fp16")))
    assert result.exit_code == 1
    assert "needs a GPU" in result.output


@pytest.mark.parametrize(
    ("world", "change", "words"),
    [
        (3, "train.batch_size=8", "a multiple of the 3 processes"),
        (2, "model.backbone_norm=batch", "give group or frozen"),
    ],
)
def test_settings_that_do_not_fit_the_processes_are_refused(
    world: int, change: str, words: str
) -> None:
    config = override(preset("shapes-tiny"), (change,))
    ranks = Ranks(rank=0, world=world, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=words):
        fit_to_machine(CoMask(config.model, config.preprocess), config, ranks)


def test_patience_ends_training(tmp_path: Path) -> None:
    changes = settings("train.epochs=6", "train.patience=2", "train.evaluate_every=1",
                       "train.learning_rate=1e-9")  # fmt: skip
    result = run(*train(tmp_path / "run", *changes))
    assert result.exit_code == 0, result.output
    assert "no better mask AP in 2 evaluations" in result.output
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint-last.pt")
    assert checkpoint.step == 6  # three evaluations of two steps each, the first of them the best
    again = run(*train(tmp_path / "run", *changes, "--resume"))
    assert again.exit_code == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint-last.pt").step == 6


def test_one_process_trains_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comask.training.api.LOCK_SECONDS", 0.3)
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        result = run(*train(tmp_path / "run"))
    assert result.exit_code == 1
    assert "another process trains there" in result.output
    assert run(*train(tmp_path / "run", *settings("train.max_steps=0"))).exit_code == 0


def test_resume_heeds_what_it_can_and_refuses_the_rest(micro_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(micro_run, folder)
    for change, words in [
        ("data.shapes_train=12", "data.shapes_train"),
        ("train.weight_decay=0.1", "train.weight_decay"),
        ("train.channels_last=true", "train.channels_last"),
    ]:
        result = run(*train(folder, "--resume", *settings(change)))
        assert result.exit_code == 1
        assert words in result.output
    write_coco(ShapesSource(num_images=40, seed=0), tmp_path / "set")  # each class in some image
    other = train(folder, "--resume")
    other[other.index("shapes")] = tmp_path / "set"
    result = run(*other)
    assert result.exit_code == 1
    assert "not those that the run was started with" in result.output
    result = run(*train(folder, "--resume", *settings("train.learning_rate=1e-4")))
    assert result.exit_code == 0, result.output
    assert re.search(
        r"before: train.learning_rate [\d.]+ -> 0.0001, train.evaluate_every 1 -> 0\n",
        result.output,
    )
    assert "; nothing to do" in result.output
    assert "wrote" not in result.output


def test_eval_only_scores_the_best_checkpoint(micro_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in micro_run.rglob("*")}
    result = run("train", "--data", "shapes", "--output", micro_run, "--eval-only")
    assert result.exit_code == 0, result.output
    assert "on 4 images" in result.output
    number = r"[\d.]+"
    assert re.search(
        rf"second stage: box AP {number} -> {number} \(plain average of the same cells {number}\), "
        rf"mask AP {number} -> {number}\n",
        result.output,
    )
    assert before == {path: path.stat().st_mtime_ns for path in micro_run.rglob("*")}
    for extra, words in (
        ("--resume", "give one of them"),
        ("--set=data.workers=1", "--eval-only"),
        ("--preset=shapes-tiny", "no --preset"),
    ):
        refused = run("train", "--data", "shapes", "--output", micro_run, "--eval-only", extra)
        assert refused.exit_code != 0
        assert words in refused.output


def test_print_config_is_what_would_run() -> None:
    result = run("train", "--preset", "comask-r101", "--print-config",
                 *settings("model.msfem_branches=2"))  # fmt: skip
    assert result.exit_code == 0
    config = from_dict(Config, json.loads(result.output))
    assert config.model.backbone == "resnet101"
    assert config.model.msfem_branches == 2


def test_fine_tuning_takes_weights_and_says_so(micro_run: Path, tmp_path: Path) -> None:
    file = micro_run / "checkpoint-best.pt"
    result = run(*train(tmp_path / "run", *settings(f"train.weights={file}", "train.max_steps=0")))
    assert result.exit_code == 0, result.output
    assert "weights: comask" in result.output
    a, b = load_checkpoint(file), load_checkpoint(tmp_path / "run" / "checkpoint-last.pt")
    for name, weight in a.weights.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(weight, b.model[name]), name
