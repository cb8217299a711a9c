"""Tells others what happens in a run: own callbacks, TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import dataclasses
import importlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comask.config import Config
from comask.errors import ConfigError
from comask.evaluate import TASKS
from comask.training.record import Step
from comask.training.validation import Validation


class Callback:
    """Is called while a run trains; a subclass overrides what it needs.

    With several processes, the first one calls. An exception ends the run.
    """

    def on_start(self, folder: Path, config: Config, step: int) -> None:
        """Training begins.

        Args:
            folder: the run's folder.
            config: all settings of the run.
            step: the number of optimiser steps that an earlier process has finished.
        """

    def on_step(self, step: Step) -> None:
        """An optimiser step is finished."""

    def on_evaluation(self, step: int, epoch: int, validation: Validation) -> None:
        """An evaluation after `step` optimiser steps is finished; epochs count from 0."""

    def on_end(self, folder: Path) -> None:
        """Training is over, or a signal or an error has ended it."""


class _Numbers(Callback):
    """Sends losses, learning rate and AP as named numbers to a tracker."""

    def send(self, numbers: dict[str, float], step: int) -> None:
        """Sends numbers of one step."""
        raise NotImplementedError

    def on_step(self, step: Step) -> None:
        """Sends the learning rate and the losses."""
        numbers = {"lr": step.rate} | step.numbers
        self.send({f"train/{name}": value for name, value in numbers.items()}, step.step)

    def on_evaluation(self, step: int, epoch: int, validation: Validation) -> None:
        """Sends the AP of each stage that has one."""
        self.send(
            {
                f"validation/{task}_AP_{stage}": metrics.values[task]["AP"]
                for stage, metrics in validation.stages.items()
                for task in TASKS
                if metrics.values[task]["AP"] >= 0  # -1 means that the data has no such objects.
            },
            step,
        )


class TensorBoard(_Numbers):
    """Writes to `tensorboard/` in the run's folder.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        self._writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter

    def on_start(self, folder: Path, config: Config, step: int) -> None:
        """Opens the file; later steps of an earlier process are hidden."""
        self._writer = self._writer(str(folder / "tensorboard"), purge_step=step + 1)

    def send(self, numbers: dict[str, float], step: int) -> None:
        """Adds a scalar for each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self, folder: Path) -> None:
        """Closes the file."""
        self._writer.close()


class WeightsAndBiases(_Numbers):
    """Logs to Weights & Biases; its own environment variables choose project and mode.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self) -> None:
        self._wandb = _imported("wandb", "wandb")

    def on_start(self, folder: Path, config: Config, step: int) -> None:
        """Starts a run, or goes on with that of an earlier process of this folder."""
        file = folder / "wandb_id.txt"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        self._wandb.init(
            id=file.read_text().strip(), name=folder.name, dir=str(folder), resume="allow",
            config=dataclasses.asdict(config),
        )  # fmt: skip

    def send(self, numbers: dict[str, float], step: int) -> None:
        """Logs the numbers."""
        self._wandb.log(numbers, step=step)

    def on_end(self, folder: Path) -> None:
        """Finishes the run."""
        self._wandb.finish()


class Mlflow(_Numbers):
    """Logs to MLflow; its own environment variables choose server and experiment.

    Raises:
        ConfigError: mlflow is not installed.
    """

    def __init__(self) -> None:
        self._mlflow = _imported("mlflow", "mlflow")

    def on_start(self, folder: Path, config: Config, step: int) -> None:
        """Starts a run, or goes on with that of an earlier process of this folder."""
        file = folder / "mlflow_id.txt"
        known = file.read_text().strip() if file.exists() else None
        run = self._mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        file.write_text(run.info.run_id)
        if known is None:
            for part, values in dataclasses.asdict(config).items():
                self._mlflow.log_params({f"{part}.{name}": value for name, value in values.items()})

    def send(self, numbers: dict[str, float], step: int) -> None:
        """Logs the numbers as metrics."""
        self._mlflow.log_metrics(numbers, step=step)

    def on_end(self, folder: Path) -> None:
        """Ends the run."""
        self._mlflow.end_run()


def open_trackers(names: Sequence[str]) -> list[Callback]:
    """Returns the trackers of these names, each once.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": Mlflow}
    return [kinds[name]() for name in dict.fromkeys(names)]


def _imported(module: str, package: str) -> Any:
    """Imports a tracker's module.

    Raises:
        ConfigError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--track {package}: the package {package} is not installed; pip install "
            f"'comask[{package}]'"
        ) from error
