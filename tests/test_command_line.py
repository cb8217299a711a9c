"""The command line: its commands, options and their earlier names, and what help shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import COMMANDS, run

from comask.cli.main import main

# Frozen: a new option is a decision, not an accident.
RUNS = {"device", "batch", "proposals", "short-side"}
VIEWS = {"tile", "tile-overlap", "tta"}
OPTIONS = {
    "train": {
        "data", "val", "preset", "config", "output", "set", "track", "resume", "seeds", "eval-only",
        "print-config",
    },
    "export": {
        "output", "precision", "score-threshold", "set", "diagnostics", "data", "limit", "json",
    },
    "quantize": {
        "calib-data", "calib-limit", "calib-method", "calib-seed", "data", "limit", "max-loss",
        "skip-cpu", "json",
    },
    "build": {
        "engine", "precision", "plugin", "profile", "rebuild", "data", "limit", "workspace",
        "optimization-level", "hardware-compatibility", "version-compatible", "compute-capability",
        "json",
    },
    "serve": {"output", "backend", "engines", "model-name", "batch", "json"},
    "infer": {
        "output", "backend", "save", "threshold", "overlay-format", "quality", *RUNS, *VIEWS, "every",
        "track",        "decode", "encode", "json",
    },
    "job": {"output", "backend", "runner", "format", "shard", "actors", *RUNS, *VIEWS, "json"},
    "eval": {
        "data", "backend", "results", "boxes", "limit", "tolerance", "trace", *RUNS, *VIEWS,
        "no-record", "report", "json",
    },
    "bench": {
        "backend", "data", "size", "runs", "warmup", "no-record", *RUNS, "plot", "json",
    },
    "sweep": {
        "backend", "device", "data", "limit", "max-loss", "grid", "runs", "plot", "json",
    },
    "soak": {"backend", "minutes", "data", *RUNS, "plot", "json"},
    "check": {"split", "boxes", "json", "page"},
    "shapes": {"count", "seed", "clutter"},
    "doctor": {"need", "json"},
}  # fmt: skip


def test_every_command_is_frozen() -> None:
    assert COMMANDS.keys() == OPTIONS.keys()
    listed = CliRunner().invoke(main, ["--help"]).output
    assert all(re.search(rf"^  {name} +\w", listed, re.MULTILINE) for name in COMMANDS)


def test_a_mistyped_command_or_option_is_answered_with_the_likely_one() -> None:
    for words, answer in [
        (["infr"], "infer"),
        (["infer", "--overlay-formt", "x"], "--overlay-format"),
    ]:
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2
        assert f"Did you mean '{answer}'" in done.output


# the name in 0.1, which stays until 0.3
ALIASES = {
    "export": {"val-data", "verify-images"},
    "quantize": {"calib-images", "val-data", "val-images", "ap-budget"},
    "build": {"val-data", "verify-images"},
    "serve": {"max-batch"},
    "eval": {"images"},
    "bench": {"images"},
    "soak": {"images"},
    "shapes": {"images"},
}


@pytest.mark.parametrize("command", OPTIONS)
def test_names_of_the_version_before_are_taken_and_hidden(command: str) -> None:
    aliases = {
        alias.removeprefix("--")
        for parameter in COMMANDS[command].params
        for alias in getattr(parameter, "aliases", ())
    }
    assert aliases == ALIASES.get(command, set())
    shown = run(command, "--help").output
    assert not [alias for alias in aliases if f"--{alias} " in shown]
    for alias in aliases:
        said = run(command, f"--{alias}", "x").output
        assert f"warning: --{alias} is called --" in said
        assert "No such option" not in said


@pytest.mark.parametrize("command", OPTIONS)
def test_help_fits_and_options_are_known(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) <= 40
    options = {
        option.removeprefix("--")
        for parameter in COMMANDS[command].params
        for option in set(parameter.opts) - set(getattr(parameter, "aliases", ()))
        if option.startswith("--")
    }
    assert options - {"verbose", "version"} == OPTIONS[command]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "2000 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE"),
     ({"GOMP_SPINCOUNT": "7"}, "7 None")],
)  # fmt: skip
def test_waiting_threads_leave_the_cores_unless_the_user_chose(
    given: dict[str, str], expected: str
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    code = f"import os, comask.cli.main; print(*map(os.environ.get, {names}))"
    rest = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=rest | given, capture_output=True, text=True
    )
    assert done.stdout.strip() == expected, done.stderr
