"""SIGINT and SIGTERM: the right exit code, one line, nothing half-written."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comask.cli.bench_work import Work
from comask.runtime.ort_session import OrtSession
from conftest import MICRO, run, settings

from comask.training.loop import Trainer

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


def check(done: Any, number: signal.Signals) -> None:
    assert done.exit_code == 128 + number, done.output
    assert done.stderr.splitlines()[-1] == LAST_WORDS[number]
    assert "Traceback" not in done.output
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [TERM])
def test_train_goes_on_after_it(tmp_path: Path, signal_at: Any, number: signal.Signals) -> None:
    arguments = ("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path,
                 *settings(*MICRO), "--set", "train.checkpoint_every=1")  # fmt: skip
    signal_at(torch, "save", 2)  # into the file of the second checkpoint
    check(run(*arguments), number)
    names = {path.name for path in tmp_path.iterdir()}
    assert "checkpoint-last.pt" in names
    assert not [name for name in names if name.endswith(".tmp")]
    again = run(*arguments, "--resume")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("number", [INT])
def test_train_is_ended_in_a_step(tmp_path: Path, signal_at: Any, number: signal.Signals) -> None:
    signal_at(Trainer, "train_step", 2)
    done = run("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path,
               *settings(*MICRO))  # fmt: skip
    check(done, number)


@pytest.mark.parametrize("number", [INT])
def test_an_export_leaves_nothing(
    micro_run: Path, tmp_path: Path, signal_at: Any, number: signal.Signals
) -> None:
    signal_at(OrtSession, "run", 1)  # the graphs are written and compared
    done = run("export", micro_run / "checkpoint-last.pt", "--output", tmp_path / "bundle",
               "--verify-images", 1)  # fmt: skip
    check(done, number)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "call", "arguments"),
    [
        (TERM, 1, ("export", "{}", "--precision", "fp16", "--verify-images", 1)),
        (INT, 5, ("eval", "{}", "--data", "shapes", "--images", 4, "--backend", "onnxruntime",
                  "--backend", "torch", "--json", "{}.json", "--report", "{}.html")),
        (TERM, 5, ("bench", "{}", "--backend", "onnxruntime", "--size", "64x64", "--json", "{}.json",
                   "--plot", "{}.png")),
        (INT, 2, ("bench", "{}", "--backend", "onnxruntime", "--sweep", "--data", "shapes", "--limit",
                  2, "--json", "{}.json")),
    ],
    ids=["export", "eval", "bench", "sweep"],
)  # fmt: skip
def test_a_bundle_is_as_it_was(
    micro_bundle: Path, tmp_path: Path, signal_at: Any, number: signal.Signals,
    arguments: tuple[Any, ...], call: int,
) -> None:  # fmt: skip
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    signal_at(OrtSession, "run", call)
    done = run(*(str(argument).format(bundle) for argument in arguments))
    check(done, number)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert list(tmp_path.iterdir()) == [bundle]


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_data_set_is_not_taken_for_whole(
    tmp_path: Path, signal_at: Any, number: signal.Signals
) -> None:
    signal_at(json, "dumps", 1)  # of the annotations, which come last
    check(run("shapes", tmp_path / "data", "--images", 2), number)
    assert not (tmp_path / "data" / "annotations" / "instances.json").exists()
    again = run("shapes", tmp_path / "data", "--images", 2)
    assert again.exit_code == 0, again.output


def test_a_terminated_sweep_reports_what_it_has(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Work._measure

    def terminated(self: Work, *arguments: Any) -> None:
        if self.scored:
            os.kill(os.getpid(), TERM)
        measure(self, *arguments)

    monkeypatch.setattr(Work, "_measure", terminated)
    monkeypatch.setattr("comask.cli.bench_work._check_reference", lambda metrics: None)
    done = run("bench", micro_bundle, "--backend", "onnxruntime", "--sweep", "--data", "shapes",
               "--limit", 1, "--runs", 1, "--grid", "short-side=96", "--grid", "batch=1", "--json",
               tmp_path / "r.json")  # fmt: skip
    check(done, TERM)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["finished"], len(report["settings"])) == (False, 1)
