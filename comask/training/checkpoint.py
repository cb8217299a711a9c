"""Checkpoints: one file with weights, configuration, classes and what it takes to go on training."""

from __future__ import annotations

import dataclasses
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comask.config import Config, from_dict
from comask.data.source import Category
from comask.errors import CheckpointError, ConfigError
from comask.models.comask import CoMask

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a run after `step` optimiser steps.

    Attributes:
        config: of the run.
        categories: the classes in label order.
        model: state dict of `CoMask`.
        optimizer: its state dict.
        step: optimiser steps done.
        best_ap: the best mask AP so far (0..1); -1 before the first evaluation.
        rng: torch's CPU generator state.
    """

    config: Config
    categories: tuple[Category, ...]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int
    best_ap: float
    rng: Tensor


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes `path` whole or not at all: a killed process leaves the previous file."""
    content = {
        "format": FORMAT,
        "config": dataclasses.asdict(checkpoint.config),
        "categories": [(c.id, c.name) for c in checkpoint.categories],
        "model": checkpoint.model,
        "optimizer": checkpoint.optimizer,
        "step": checkpoint.step,
        "best_ap": checkpoint.best_ap,
        "rng": checkpoint.rng,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint without executing anything in it.

    Raises:
        CheckpointError: when the file is missing, is not a comask checkpoint, or holds pickled code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path}: not a readable checkpoint (or one with code in it, which is never run): "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path}: not a comask checkpoint; comask-train writes those")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has checkpoint format {content['format']}, this comask reads {FORMAT}"
        )
    try:
        return Checkpoint(
            config=from_dict(Config, content["config"]),
            categories=tuple(Category(id=i, name=name) for i, name in content["categories"]),
            model=content["model"],
            optimizer=content["optimizer"],
            step=content["step"],
            best_ap=content["best_ap"],
            rng=content["rng"],
        )
    except (KeyError, TypeError, ValueError) as error:
        what = str(error) if isinstance(error, ConfigError) else f"{error!r} is missing or wrong"
        raise CheckpointError(f"{path}: {what}") from error


def model_from_checkpoint(checkpoint: Checkpoint) -> CoMask:
    """The trained network, in evaluation mode.

    Raises:
        CheckpointError: when the weights do not fit the configuration.
    """
    model = CoMask(checkpoint.config.model, checkpoint.config.preprocess)
    load_weights(model, checkpoint.model)
    return model.eval()


def load_weights(model: CoMask, weights: dict[str, Tensor]) -> None:
    """Copies a whole state dict into `model`.

    Raises:
        CheckpointError: naming the first weights that are missing, superfluous or of another shape.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the weights do not fit the model's configuration: {reason}"
        ) from error
