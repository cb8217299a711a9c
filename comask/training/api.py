"""The Python interface of `comask train`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comask.bundle import BEST
from comask.config import Config
from comask.config_reading import override, read_config
from comask.errors import TrainingError
from comask.files import locked
from comask.presets import preset as named_preset
from comask.training.callbacks import Callback
from comask.training.distributed import join
from comask.training.loop import LAST
from comask.training.run import train_run
from comask.training.validation import Validation

LOCK_SECONDS = 20.0  # loading processes of a killed run hold its lock for up to five


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What a finished run left.

    Attributes:
        best: the checkpoint of the best mask AP.
        last: the checkpoint of the last step.
        config: all settings, with the data's number of classes.
        step: the number of finished optimiser steps.
        validation: the scores of the last evaluation; None without one.
    """

    best: Path
    last: Path
    config: Config
    step: int
    validation: Validation | None


def train(
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    val: str | Path | Sequence[str | Path] = (),
    preset: str = "comask-r50",
    config: Config | str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Trains CoMask as `comask train` does.

    Args:
        data: a data set in any layout that `comask train` takes, `shapes`, or several sets.
        output: the run's folder, which is made if it does not exist.
        val: data for validation; by default the validation part of `data`, or a share of it.
        preset: the name of the settings to start from.
        config: settings instead of a preset: a `Config`, or a file as of `--config`, which may leave out
            what the preset has.
        settings: values by their dotted names, such as `{"train.epochs": 12}`, over all others.
        resume: whether to go on from the folder's last checkpoint.
        callbacks: objects that are told what happens.

    Raises:
        CheckpointError: the folder holds a run, and `resume` is false.
        ConfigError: settings are wrong, or do not fit the data.
        DataError: the data cannot be used.
        TrainingError: training cannot continue, or another process trains in the folder.
    """
    chosen = config if isinstance(config, Config) else named_preset(preset)
    if isinstance(config, str | Path):
        chosen = read_config(Path(config), chosen)
    changes = tuple(f"{name}={_text(value)}" for name, value in (settings or {}).items())
    chosen = override(chosen, changes)
    folder = Path(output)
    with join() as ranks, run_folder(folder, lock=ranks.first):
        trainer = train_run(
            chosen, _names(data), _names(val), folder, ranks, settings=changes, resume=resume,
            callbacks=callbacks,
        )  # fmt: skip
    return TrainingResult(
        best=folder / BEST,
        last=folder / LAST,
        config=trainer.config,
        step=trainer.step,
        validation=trainer.validation,
    )


def _names(data: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(data)] if isinstance(data, str | Path) else [str(one) for one in data]


def _text(value: Any) -> str:
    """Returns a value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def run_folder(path: Path, *, lock: bool) -> Iterator[None]:
    """Creates a run's folder and its parents; removes those that are still empty at the end.

    Args:
        path: the folder.
        lock: whether to keep other processes from training there.

    Raises:
        TrainingError: when another process trains there.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(path) if lock else nullcontext():
            yield
    finally:
        with suppress(OSError):  # a folder that is not empty stays
            for folder in made:
                folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with locked(folder, patience=LOCK_SECONDS):
            yield
    except BlockingIOError as error:
        raise TrainingError(
            f"{folder}: another process trains there; wait for it, end it, or give another --output"
        ) from error
