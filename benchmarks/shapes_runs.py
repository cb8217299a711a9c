"""Trains a model with the schedule of `shapes-tiny` and scores it on 200 unseen images.

The comparisons in this folder consist of such runs. Rows are kept in a JSON-lines file, so that a stopped
comparison continues where it ended.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from comask.config import Config
from comask.config_reading import override
from comask.data.loading import Batch, epoch_batches, load_batches
from comask.data.shapes import ShapesSource
from comask.data.training_set import TrainingSet
from comask.evaluate import evaluate
from comask.models.comask import CoMask
from comask.presets import preset
from comask.progress import Progress
from comask.runtime.backends.pytorch import torch_stages
from comask.runtime.predictor import Predictor
from comask.structures import Detections
from comask.training import train
from comask.training.checkpoint import load_checkpoint, model_from_checkpoint
from comask.training.losses import Objective
from comask.training.optim import build_optimizer, learning_rate, set_learning_rate

TEST_SEED, TEST_IMAGES = 4_000_000, 200
Row = dict[str, Any]


def remembered(path: Path, key: Row, config: Config, measure: Callable[[Config], Row]) -> Row:
    """Returns the row in `path` with this key and configuration, or measures and stores a new one."""
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True)
    key = key | {"config": hashlib.sha256(settings.encode()).hexdigest()[:12]}
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for row in rows:
        if row.items() >= key.items():
            return row
    row = key | measure(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _train(
    module: nn.Module,
    losses: Callable[[Batch], dict[str, Tensor]],
    config: Config,
    dataset: TrainingSet,
    title: str,
) -> tuple[float, int]:
    """Trains for the preset's epochs; returns the seconds and the FLOPs of one forward step."""
    module.train()
    optimizer = build_optimizer(module, config.train)
    size, seed = config.train.batch_size, config.train.seed
    epochs = range(config.train.epochs)
    batches = [batch for epoch in epochs for batch in epoch_batches(dataset, size, seed, epoch)]
    per_epoch = len(batches) // len(epochs)
    with (
        FlopCounterMode(display=False) as counter,
        load_batches(dataset, batches[:1], workers=0) as loaded,
    ):
        losses(next(loaded))
    torch.manual_seed(config.train.seed)
    started = time.perf_counter()
    with (
        Progress(title, len(batches)) as progress,
        load_batches(dataset, batches, workers=0) as loaded,
    ):
        for step, batch in enumerate(loaded):
            rate = learning_rate(config.train, step, per_epoch, len(batches))
            set_learning_rate(optimizer, rate)
            total = torch.stack(list(losses(batch).values())).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            progress.advance(note=f"loss {total.item():.3f}")
    return time.perf_counter() - started, counter.get_total_flops()


def train_and_score(
    name: str,
    module: nn.Module,
    losses: Callable[[Batch], dict[str, Tensor]],
    predict: Callable[[np.ndarray], Detections],
    config: Config,
) -> Row:
    """Trains one model, scores it, and returns the row."""
    images = config.data.shapes_train
    dataset = TrainingSet(
        ShapesSource(num_images=images, seed=config.train.seed),
        list(range(images)),
        config.preprocess,
        config=config.data,
        seed=config.train.seed,
    )
    title = f"{name}, lr {config.train.learning_rate:g}, seed {config.train.seed}"
    seconds, flops = _train(module, losses, config, dataset, title)
    module.eval()
    test = ShapesSource(num_images=TEST_IMAGES, seed=TEST_SEED)
    indices = list(range(TEST_IMAGES))
    metrics = evaluate(test, indices, (predict(test.image(i)) for i in indices))
    return {
        "mask_ap": metrics.values["segm"]["AP"],
        "box_ap": metrics.values["bbox"]["AP"],
        "train_seconds": seconds,
        "gflop_per_image": flops / config.train.batch_size / 1e9,
        "parameters": sum(p.numel() for p in module.parameters()),
        "images": images * config.train.epochs,
    }


# The settings that these trainings use in addition to the model's; others would be silently ignored.
HEEDED = {
    "data.shapes_train", "data.flip_probability",
    *(f"train.{name}" for name in (
        "optimizer", "schedule", "learning_rate", "batch_size", "reference_batch", "momentum",
        "adamw_beta2", "weight_decay", "epochs", "step_epochs", "step_factor", "warmup_steps",
        "warmup_factor",
    )),
}  # fmt: skip


def base_config(settings: tuple[str, ...]) -> Config:
    """Returns `shapes-tiny` with settings that a row of these benchmarks can honour.

    Raises:
        click.BadParameter: if a setting has no effect here.
    """
    for setting in settings:
        key = setting.partition("=")[0]
        if key not in HEEDED and not key.startswith(("model.", "preprocess.")):
            raise click.BadParameter(f"{key} has no effect in this benchmark; leave it out")
    return override(preset("shapes-tiny"), settings)


def with_seed(config: Config, seed: int) -> Config:
    """Returns the same training with another seed: other weights, images and samples."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def measured(output: Path, name: str, settings: tuple[str, ...], seeds: int) -> list[Row]:
    """Returns the rows of `shapes-tiny` with these settings, one for each seed; see `remembered`."""
    rows = []
    for seed in range(seeds):
        config = with_seed(override(preset("shapes-tiny"), settings), seed)
        key = {"variant": name, "seed": seed}
        rows.append(remembered(output / "rows.jsonl", key, config, comask))
    return rows


def trained(data: str, folder: Path, settings: dict[str, Any]) -> CoMask:
    """Returns `shapes-tiny` trained as by `comask train`; trains it first if its folder has none.

    Args:
        data: the value of `--data`.
        folder: the run's folder; a run that was stopped goes on.
        settings: by dotted names.
    """
    last, done = folder / "checkpoint-last.pt", folder / "trained.txt"
    if not done.exists():
        train(data, folder, preset="shapes-tiny", settings=settings, resume=last.exists())
        done.write_text("")
    return model_from_checkpoint(load_checkpoint(last)).eval()


def comask(config: Config, name: str = "CoMask") -> Row:
    """Trains and scores CoMask with this configuration."""
    torch.manual_seed(config.train.seed)
    model = CoMask(config.model, config.preprocess)
    objective = Objective(model)
    return train_and_score(
        name,
        objective,
        lambda batch: objective(batch.images, batch.image_sizes, batch.targets),
        Predictor(
            torch_stages(model), config.preprocess, mask_threshold=config.model.mask_threshold
        ),
        config,
    )
