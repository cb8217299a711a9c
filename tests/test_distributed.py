"""Whole trainings in processes of their own: several ranks, and runs that are killed."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MICRO, settings
from data_sets import edit

from comask.data.coco import write_coco
from comask.data.shapes import ShapesSource
from comask.training.checkpoint import load_checkpoint
from comask.training.record import read_rows

KILLS = 10
STEADY = (
    *MICRO,
    "model.backbone_norm=group",  # BatchNorm would see each process's images only
    "train.optimizer=sgd",  # AdamW turns a gradient's rounding near 0 into whole steps
    "train.learning_rate=0.001",  # with 0.01 the third step blows up, and any rounding with it
    "train.ema_decay=0.9",
    "train.evaluate_every=1",
    "data.workers=0",
)


def command(data: Path, output: Path, *extra: str, ranks: int = 1, changes: tuple[str, ...] = ()):
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [
        *launcher, "comask.cli.train", "--data", str(data), "--val", str(data), "--preset",
        "shapes-tiny", "--output", str(output), *settings(*STEADY, *changes), *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def landscape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 10 images of one shape, two of them without an object."""

    class Landscape(ShapesSource):
        def __init__(self) -> None:
            super().__init__(num_images=400, seed=6)
            every = [i for i in range(400) if super(Landscape, self).info(i).width == 128]
            empty = [i for i in every if not super(Landscape, self).annotations(i)]
            self.places = [*empty[:2], *[i for i in every if i not in empty][:8]]

        def __len__(self) -> int:
            return len(self.places)

        def info(self, index: int):
            return super().info(self.places[index])

        def image(self, index: int):
            return super().image(self.places[index])

        def annotations(self, index: int):
            return super().annotations(self.places[index])

    folder = tmp_path_factory.mktemp("data") / "landscape"
    write_coco(Landscape(), folder)
    return folder


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def assert_same(a: Path, b: Path, **tolerance: float) -> None:
    first, second = (load_checkpoint(folder / "checkpoint-last.pt") for folder in (a, b))
    assert first.step == second.step
    for name, weight in first.model.items():
        torch.testing.assert_close(second.model[name], weight, **tolerance)
        torch.testing.assert_close(second.ema[name], first.ema[name], **tolerance)


def test_two_ranks_train_as_one(landscape: Path, tmp_path: Path) -> None:
    """Ten images in batches of four: the last batch leaves a rank with fewer, and none waits."""
    run(command(landscape, tmp_path / "one"))
    run(command(landscape, tmp_path / "two", ranks=2))
    assert_same(tmp_path / "one", tmp_path / "two", rtol=1e-4, atol=1e-6)
    losses = [read_rows(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    for a, b in zip(*losses, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
    evaluations = [read_rows(tmp_path / name / "eval.csv") for name in ("one", "two")]
    assert len(evaluations[0]) == len(evaluations[1]) == 6


@pytest.mark.slow
def test_data_are_read_and_reported_by_one_of_the_ranks(landscape: Path, tmp_path: Path) -> None:
    """The others learn what it found: the same images, or the same refusal."""
    data = tmp_path / "set"
    shutil.copytree(landscape, data)
    edit(data, lambda content: content["annotations"][0].update(segmentation=[]))
    shared = set(Path("/dev/shm").glob("comask-*"))
    arguments = command(data, tmp_path / "run", ranks=2, changes=("train.max_steps=1",))
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("data: 1 annotation without segmentation (left out)") == 1
    edit(data, lambda content: [a.update(iscrowd=1) for a in content["annotations"]])
    arguments = command(data, tmp_path / "none", ranks=2)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("no object to learn from in 10 training images") == 1
    assert "shared_data.py" not in done.stderr  # the traceback is torchrun's own
    assert set(Path("/dev/shm").glob("comask-*")) <= shared  # nothing is left in memory


def test_a_rank_without_an_object_hangs_nobody(landscape: Path, tmp_path: Path) -> None:
    """Batches of two: each of the two empty images is all that a rank sees in some step."""
    changes = ("train.batch_size=2", "train.evaluate_every=0", "train.micro_batch=1")
    run(command(landscape, tmp_path / "run", ranks=2, changes=changes))
    assert load_checkpoint(tmp_path / "run" / "checkpoint-last.pt").step == 5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(
    landscape: Path, tmp_path: Path, ranks: int
) -> None:
    changes = ("train.epochs=8", "train.checkpoint_every=2", "train.evaluate_every=4")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(landscape, whole, ranks=ranks, changes=changes))
    arguments = command(landscape, killed, "--resume", ranks=ranks, changes=changes)
    moments = random.Random(7)
    for _ in range(KILLS if ranks == 1 else 2):
        progress = (killed / "metrics.csv").stat().st_mtime if killed.exists() else 0.0
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        # Most of its life a process spends starting: wait for its first step, then a random time.
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            file = killed / "metrics.csv"
            if file.exists() and file.stat().st_mtime > progress:
                break
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.6))
        signalled = process.poll() is None
        if signalled:
            # torchrun's processes, too, which are not of its session
            subprocess.run(["pkill", "-KILL", "-f", f"[-]-output {killed}"], check=False)
        process.wait()
    run(arguments)
    assert_same(whole, killed, rtol=0, atol=0)
    assert [r["step"] for r in read_rows(killed / "metrics.csv")] == [str(i) for i in range(1, 25)]
    assert read_rows(whole / "eval.csv") == read_rows(killed / "eval.csv")
