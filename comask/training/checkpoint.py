"""Checkpoints: one file with weights, configuration, classes and what it takes to go on training."""

from __future__ import annotations

import dataclasses
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
from comask.whole_file import whole_file

FORMAT = 2
STORED = ("model", "ema", "optimizer", "scaler", "step", "best_ap", "stale", "data")  # as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a run after `step` optimiser steps.

    Attributes:
        config: of the run.
        categories: the classes in label order.
        model: state dict of `CoMask`.
        ema: the same of the averaged weights; None where none are kept.
        optimizer: its state dict.
        scaler: of fp16's gradient scaler; empty in other precisions.
        step: optimiser steps done. With the configuration it fixes all randomness to come, the
            learning rate and the place in the data, so none of those is stored.
        best_ap: the best mask AP so far (0..1); -1 before the first evaluation.
        stale: evaluations since then.
        data: digest of the images it trains and is evaluated on, see `data_digest`.
    """

    config: Config
    categories: tuple[Category, ...]
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    step: int
    best_ap: float
    stale: int
    data: str

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is evaluated and exported: the averaged weights, where there are any."""
        return self.model if self.ema is None else self.ema


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes `path` whole or not at all: a killed process leaves the previous file."""
    content = {
        "format": FORMAT,
        "config": dataclasses.asdict(checkpoint.config),
        "categories": [(c.id, c.name) for c in checkpoint.categories],
        **{name: getattr(checkpoint, name) for name in STORED},
    }
    with whole_file(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint without executing anything in it.

    Raises:
        CheckpointError: when the file is missing, is not a comask checkpoint, or holds pickled code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        pickle.UnpicklingError,
    ) as error:
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
            **{name: content[name] for name in STORED},
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
    load_weights(model, checkpoint.weights)
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
