"""SIGINT and SIGTERM: the right exit code, one line, nothing half-written."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MICRO, run, settings

from comask.export import pipeline
from comask.runtime.backends.ort import OrtSession
from comask.runtime.bench.sweep import Sweep
from comask.training.checkpoint import load_checkpoint
from comask.training.loop import LAST, Trainer
from comask.training.record import read_rows

INT, TERM = signal.SIGINT, signal.SIGTERM
LAST_WORDS = {INT: "interrupted", TERM: "terminated"}


@pytest.fixture
def signal_at(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> Callable[[Any, str, int], None]:
    """Has the signal come when a method is called for the n-th time."""

    def at(owner: Any, name: str, call: int) -> None:
        original, count = getattr(owner, name), itertools.count(1)

        def signalled(*arguments: Any, **options: Any) -> Any:
            if next(count) == call:
                os.kill(os.getpid(), number)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, signalled)

    return at


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """A shell that runs the tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def check(done: Any, number: signal.Signals, words: str = "") -> None:
    assert done.exit_code == 128 + number, done.output
    assert done.stderr.splitlines()[-1] == (words or LAST_WORDS[number])
    assert "Traceback" not in done.output
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


TRAIN = ("train", "--data", "shapes", "--preset", "shapes-tiny", *settings(*MICRO),
         *settings("train.epochs=2", "data.shapes_train=12"), "--output")  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert run(*TRAIN, output).exit_code == 0
    return output


@pytest.mark.parametrize(
    ("number", "owner", "name", "call", "step"),
    [
        (INT, Trainer, "train_step", 2, 2),
        (TERM, torch, "save", 2, 4),  # of the first epoch, into `LAST`
        (TERM, Trainer, "run_evaluation", 1, 3),
    ],
    ids=["step", "save", "evaluation"],
)
def test_train_keeps_what_it_did(
    undisturbed: Path, tmp_path: Path, signal_at: Any, number: signal.Signals, owner: Any, name: str,
    call: int, step: int,
) -> None:  # fmt: skip
    signal_at(owner, name, call)
    done = run(*TRAIN, tmp_path)
    check(done, number, f"interrupted after step {step} of 6: continue with --resume")
    assert load_checkpoint(tmp_path / LAST).step == step
    assert not list(tmp_path.glob(".*.tmp"))
    again = run(*TRAIN, tmp_path, "--resume")
    assert again.exit_code == 0, again.output
    ours, whole = (load_checkpoint(folder / LAST) for folder in (tmp_path, undisturbed))
    assert ours.model.keys() == whole.model.keys()
    assert all(torch.equal(ours.model[key], whole.model[key]) for key in whole.model)
    assert read_rows(tmp_path / "eval.csv") == read_rows(undisturbed / "eval.csv")


def test_a_signal_to_the_whole_group_takes_no_loader_away(tmp_path: Path) -> None:
    """As a terminal's Ctrl-C and a scheduler's SIGTERM come: to the loading processes as well."""
    longer = settings("data.workers=1", "train.epochs=1000")
    process = subprocess.Popen(
        [sys.executable, "-m", "comask.cli.train", *TRAIN[1:], str(tmp_path), *longer],
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            if process.poll() is not None or (tmp_path / "metrics.csv").exists():
                break
            time.sleep(0.1)
        os.killpg(process.pid, TERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + TERM, said
    assert "interrupted after step" in said
    assert load_checkpoint(tmp_path / LAST).step > 0


def test_a_second_signal_ends_training_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Trainer, *arguments: Any) -> None:
        os.kill(os.getpid(), TERM)
        os.kill(os.getpid(), TERM)

    monkeypatch.setattr(Trainer, "train_step", step)
    check(run(*TRAIN, tmp_path), TERM)
    assert not (tmp_path / LAST).exists()


@pytest.mark.parametrize("number", [TERM])
def test_a_signal_after_the_last_step_changes_nothing(
    tmp_path: Path, signal_at: Any, number: signal.Signals
) -> None:
    signal_at(Trainer, "run_evaluation", 2)
    done = run(*TRAIN, tmp_path)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("number", [INT])
def test_an_export_leaves_nothing(
    micro_run: Path, tmp_path: Path, signal_at: Any, number: signal.Signals
) -> None:
    signal_at(pipeline, "export_stage1", 1)  # the weights are written
    done = run("export", micro_run / "checkpoint-last.pt", "--output", tmp_path / "bundle",
               "--limit", 1)  # fmt: skip
    check(done, number)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "owner", "name", "call", "arguments"),
    [
        (TERM, pipeline, "export_stage1", 1,
         ("export", "{}", "--precision", "fp16", "--limit", 1)),
        (INT, OrtSession, "run", 5,
         ("eval", "{}", "--data", "shapes", "--limit", 4, "--backend", "onnxruntime", "--backend",
          "torch", "--json", "{}.json", "--report", "{}.html")),
        (TERM, OrtSession, "run", 5,
         ("bench", "{}", "--backend", "onnxruntime", "--size", "64x64", "--json", "{}.json", "--plot",
          "{}.png")),
        (INT, OrtSession, "run", 2,
         ("sweep", "{}", "--backend", "onnxruntime", "--data", "shapes", "--limit", 2,
          "--json", "{}.json")),
    ],
    ids=["export", "eval", "bench", "sweep"],
)  # fmt: skip
def test_a_bundle_is_as_it_was(
    micro_bundle: Path, tmp_path: Path, signal_at: Any, number: signal.Signals,
    arguments: tuple[Any, ...], owner: Any, name: str, call: int,
) -> None:  # fmt: skip
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    signal_at(owner, name, call)
    done = run(*(str(argument).format(bundle) for argument in arguments))
    check(done, number)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert list(tmp_path.iterdir()) == [bundle]


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_data_set_is_not_taken_for_whole(
    tmp_path: Path, signal_at: Any, number: signal.Signals
) -> None:
    signal_at(json, "dumps", 1)  # of the annotations, which come last
    check(run("shapes", tmp_path / "data", "--count", 2), number)
    assert not (tmp_path / "data" / "annotations" / "instances.json").exists()
    again = run("shapes", tmp_path / "data", "--count", 2)
    assert again.exit_code == 0, again.output


def test_a_terminated_sweep_reports_what_it_has(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Sweep._measure

    def terminated(self: Sweep, *arguments: Any) -> None:
        if self.scored:
            os.kill(os.getpid(), TERM)
        measure(self, *arguments)

    monkeypatch.setattr(Sweep, "_measure", terminated)
    monkeypatch.setattr("comask.runtime.bench.sweep._check_reference", lambda metrics: None)
    done = run("sweep", micro_bundle, "--backend", "onnxruntime", "--data", "shapes",
               "--limit", 1, "--runs", 1, "--grid", "short-side=96", "--grid", "batch=1", "--json",
               tmp_path / "r.json")  # fmt: skip
    check(done, TERM)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["finished"], len(report["settings"])) == (False, 1)
