"""Checkpoints: one file with weights, configuration, classes and the state to resume training."""

from __future__ import annotations

import dataclasses
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comask.config import Config
from comask.config_reading import from_dict
from comask.data.source import Category
from comask.errors import CheckpointError, ComaskError
from comask.files import whole_file
from comask.models.comask import CoMask, load_weights

FORMAT = 2  # the version of the file's format
STORED: dict[str, Any] = {  # fields that are stored unchanged, with their types
    "model": dict, "ema": dict | None, "optimizer": dict, "scaler": dict, "step": int,
    "best_ap": int | float, "stale": int, "data": str,
}  # fmt: skip


def read_torch_file(path: Path) -> object:
    """Reads a file of `torch.save` to the CPU.

    Raises:
        CheckpointError: the file cannot be read, holds pickled code, or is compressed. `torch.save` never
            compresses, and a few compressed kilobytes could fill the memory. The text does not name the
            file.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError("is not a file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:
                raise CheckpointError(
                    f"unpacks to {unpacked} bytes, but PyTorch never compresses its files"
                )
        # The warnings are about kinds of pickle; an unreadable file raises an exception.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # A broken stream can make an unpickler raise anything.
        raise CheckpointError(why_unreadable(error)) from error


def why_unreadable(error: Exception) -> str:
    """Returns why weights could not be loaded, in one line without PyTorch's advice to run code."""
    text = str(error).strip()
    blocked = re.search(r"GLOBAL (\S+)", text)
    if blocked:
        name = blocked[1]
        return f"it holds a pickled {name}, and code in files is never run: save its weights alone"
    if isinstance(error, OSError) and (error.filename or not error.strerror):  # no file, no network
        return error.strerror or text.splitlines()[0]
    # If torch's text advises to load the file unsafely, only the error's name is shown.
    detail = type(error).__name__ if not text or "weights_only" in text else text.splitlines()[0]
    return f"neither PyTorch's format nor safetensors, or cut short: {detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a run after `step` optimiser steps.

    Attributes:
        config: the run's configuration.
        categories: the classes in label order.
        model: the state dict of `CoMask`.
        ema: the state dict of the averaged weights; None if the run does not average.
        optimizer: the optimiser's state dict.
        scaler: the state dict of fp16's gradient scaler; empty in other precisions.
        step: the number of finished optimiser steps. With the configuration, it determines all further
            randomness, the learning rate and the position in the data, so these are not stored.
        best_ap: the best mask AP so far (0..1); -1 before the first evaluation.
        stale: the number of evaluations since the best one.
        data: the digest of the images for training and validation, see `TrainingData.digest`.
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
        """The weights to evaluate and export: the averaged ones, if the run averages."""
        return self.model if self.ema is None else self.ema


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes `path` atomically: a killed process leaves the previous file."""
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
        CheckpointError: the file is missing, is not a comask checkpoint, or holds pickled code.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = read_torch_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path}: not a comask checkpoint; 'comask train' writes them")
    if type(content["format"]) is not int or content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has checkpoint format {content['format']!r:.80}; this comask reads {FORMAT}"
        )
    try:
        for name, kinds in STORED.items():
            if not isinstance(content[name], kinds):
                raise CheckpointError(f"{name} is of type {type(content[name]).__name__}")
        return Checkpoint(
            config=from_dict(Config, content["config"]),
            categories=tuple(
                from_dict(Category, {"id": id_, "name": name}, "categories.")
                for id_, name in content["categories"]
            ),
            **{name: content[name] for name in STORED},
        )
    except (ComaskError, KeyError, TypeError, ValueError) as error:
        known = isinstance(error, ComaskError)
        problem = str(error) if known else f"{error!r} is missing or wrong"
        raise CheckpointError(f"{path}: {problem}") from error


def model_from_checkpoint(checkpoint: Checkpoint) -> CoMask:
    """Returns the trained network in evaluation mode.

    Raises:
        CheckpointError: the weights do not fit the configuration.
    """
    model = CoMask(checkpoint.config.model, checkpoint.config.preprocess)
    load_weights(model, checkpoint.weights)
    return model.eval()
