"""Runs a training: from a data set and settings to the checkpoints in the run's folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from comask.bundle import BEST
from comask.config import Config, DataConfig
from comask.data.open_data import TrainingData, open_training_data
from comask.data.packed import PackedSource, open_arrays, write_arrays
from comask.data.source import InstanceSource
from comask.errors import CheckpointError, ComaskError, ConfigError
from comask.files import write_whole
from comask.models.comask import CoMask
from comask.training.auto_batch import find_batch_size
from comask.training.callbacks import Callback, TensorBoard
from comask.training.checkpoint import Checkpoint, load_checkpoint, model_from_checkpoint
from comask.training.distributed import (
    Ranks,
    largest_over_ranks,
    leads_its_machine,
    share_on_machine,
)
from comask.training.import_weights import import_weights
from comask.training.loop import LAST, Trainer
from comask.training.training_images import draw_training_images
from comask.training.validation import Validation, Validator

Say = Callable[[str], None]

# A resumed run may change how it trains, but not these settings, which its steps and state depend on.
FIXED = {
    "train.batch_size", "train.seed", "train.optimizer", "train.ema_decay", "train.weights",
    "train.channels_last", "train.layer_decay", "train.momentum", "train.adamw_beta2",
    "train.weight_decay",
}  # fmt: skip


def train_run(
    config: Config,
    data: Sequence[str],
    val: Sequence[str],
    output: Path,
    ranks: Ranks,
    *,
    settings: tuple[str, ...] = (),
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    say: Say = print,
    signal: Callable[[], int] = lambda: 0,
) -> Trainer:
    """Trains until the last step, the end of `train.patience`, or a signal.

    Args:
        config: all settings; the number of classes is taken from the data.
        data: data sets, see `comask.data.layouts`, or `shapes`.
        val: the same for validation; without any, the validation part of `data`, or a share of it.
        output: the run's folder, which must exist.
        ranks: this process and the number of processes that train together.
        settings: the settings that the user gave, as `key=value`; error texts quote them.
        resume: whether to continue from the folder's last checkpoint, if it has one.
        callbacks: objects that are told what happens; the first process calls them.
        say: called with lines for the user, on the first process.
        signal: returns the number of a signal that asked to end the run, 0 for no signal.

    Returns:
        The trainer in its final state.

    Raises:
        CheckpointError: the folder holds a run, and `resume` is false.
        ConfigError: settings do not fit the data, or the run that is resumed.
        DataError: the data cannot be used.
        TrainingError: training cannot continue.
    """
    if not resume and (output / LAST).exists():
        raise CheckpointError(
            f"{output}: holds a run already; go on with --resume or give another --output"
        )
    say = say if ranks.first else _nothing
    opened = open_shared(config.data, data, val, config.train.seed, ranks)
    config = _with_classes(config, settings, opened.train)
    if resume and not config.train.batch_size and (output / LAST).exists():
        config = _with_batch_size(config, load_checkpoint(output / LAST).config.train.batch_size)
    checkpoint = _checkpoint_to_resume(output, config, opened.digest, say) if resume else None
    torch.manual_seed(config.train.seed)
    model = CoMask(config.model, config.preprocess)
    model.backbone.recompute = config.train.checkpoint_activations
    if checkpoint is None:
        _import_weights(model, config, opened.train, ranks, say)
    if not config.train.batch_size:
        config = _with_fitting_batch(model.to(ranks.device), config, ranks, say)
    model = fit_to_machine(model, config, ranks)
    if ranks.first:
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        write_whole(output / "config.json", text.encode())
    say(
        f"{len(opened.train_indices)} training images, {len(opened.val_indices)} for validation, "
        f"{config.model.num_classes} classes, {ranks.world} x {ranks.device.type}"
    )
    if config.train.tensorboard and not any(isinstance(c, TensorBoard) for c in callbacks):
        callbacks = [*callbacks, TensorBoard()]
    trainer = Trainer(
        model,
        config,
        opened,
        output,
        ranks=ranks,
        evaluate=_validator(opened, config, ranks, output) if config.train.evaluate_every else None,
        resume=checkpoint,
        callbacks=callbacks,
        signal=signal,
    )
    if ranks.first and checkpoint is None:
        draw_training_images(trainer.dataset, config.train.batch_size, output)
    if checkpoint and trainer.is_finished:
        say(f"finished already at step {trainer.step}; nothing to do")
    elif checkpoint:
        say(f"going on from step {trainer.step} of {trainer.total_steps}")
    trainer.train()
    return trainer


def evaluate_run(
    data: Sequence[str], val: Sequence[str], output: Path, ranks: Ranks
) -> tuple[Validation, Checkpoint, int]:
    """Scores the best checkpoint of a finished run with the settings in the checkpoint.

    Returns:
        The scores, the checkpoint, and the number of images.

    Raises:
        CheckpointError: the folder has no best checkpoint.
        ConfigError: the data has other categories.
        DataError: the data cannot be used.
    """
    checkpoint = load_checkpoint(output / BEST)
    config = checkpoint.config
    opened = open_shared(config.data, data, val, config.train.seed, ranks)
    if opened.train.categories != checkpoint.categories:
        raise ConfigError(
            f"--data {' '.join(data)}: its categories are not those of {output / BEST}"
        )
    model = model_from_checkpoint(checkpoint).to(ranks.device)
    validator = _validator(opened, config, ranks, None)
    return validator(model, checkpoint.step, last=True), checkpoint, len(opened.val_indices)


def _import_weights(
    model: CoMask, config: Config, source: InstanceSource, ranks: Ranks, say: Say
) -> None:
    """Loads a new run's weights, and tells the user about them."""
    backbone = config.model.backbone
    if ranks.device.type == "cpu" and not backbone.endswith("-slim"):
        say(
            f"warning: no GPU; on a CPU, training takes days with model.backbone={backbone}, and "
            f"minutes with --preset coco-slim"
        )
    weights = import_weights(model, config.train.weights, source.categories)
    if config.train.weights != "none":
        for line in weights.lines():
            say(line)
    elif config.model.frozen_stages:
        say(
            f"warning: model.frozen_stages={config.model.frozen_stages} freezes random weights; to "
            f"train from scratch, set model.frozen_stages=0 and model.backbone_norm=group"
        )


def fit_to_machine(model: CoMask, config: Config, ranks: Ranks) -> CoMask:
    """Moves `model` to the device of `ranks`, with BatchNorm over the images of all processes.

    Raises:
        ConfigError: a setting cannot be used on this machine.
    """
    train, cpu = config.train, ranks.device.type == "cpu"
    resnet = config.model.backbone != "convnext_tiny"
    if train.checkpoint_activations and config.model.backbone_norm == "batch" and resnet:
        raise ConfigError(
            "train.checkpoint_activations=true: would update BatchNorm's statistics twice a step; set "
            "model.backbone_norm=frozen or group"
        )
    if train.batch_size % ranks.world:
        raise ConfigError(
            f"train.batch_size={train.batch_size}: expected a multiple of the {ranks.world} processes"
        )
    if train.precision == "fp16" and cpu:
        raise ConfigError("train.precision=fp16: needs a GPU; on a CPU give bf16 or fp32")
    model.to(ranks.device)
    if config.model.backbone_norm == "batch" and ranks.world > 1:
        if cpu:
            raise ConfigError(
                "model.backbone_norm=batch: several processes need GPUs for it, since PyTorch "
                "synchronises BatchNorm there only; give group or frozen, or one process"
            )
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert isinstance(synced, CoMask)
        model = synced
    return model


def _validator(
    opened: TrainingData, config: Config, ranks: Ranks, output: Path | None
) -> Validator:
    return Validator(
        opened.val,
        opened.val_indices,
        config.preprocess,
        mask_threshold=config.model.mask_threshold,
        ranks=ranks,
        pictures=output / "pictures" if output else None,
    )


def _with_classes(config: Config, settings: tuple[str, ...], source: InstanceSource) -> Config:
    """Returns `config` with the data's number of classes."""
    classes = len(source.categories)
    named = [s for s in settings if s.startswith("model.num_classes=")]
    if named and config.model.num_classes != classes:
        raise ConfigError(f"{named[0]}: the data has {classes} categories; leave the setting out")
    model = dataclasses.replace(config.model, num_classes=classes)
    return dataclasses.replace(config, model=model)


def _with_fitting_batch(model: CoMask, config: Config, ranks: Ranks, say: Say) -> Config:
    """Returns `config` with the batch that fits into the GPU of every process."""
    images = -int(largest_over_ranks(-find_batch_size(model, config), ranks))
    say(f"train.batch_size={ranks.world * images}, which fits into the GPU's memory")
    return _with_batch_size(config, ranks.world * images)


def _with_batch_size(config: Config, images: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=images))


def _checkpoint_to_resume(output: Path, config: Config, digest: str, say: Say) -> Checkpoint | None:
    """Returns the run's last checkpoint; None if it has none yet, as when a job is queued again."""
    if not (output / LAST).exists():
        say(f"{output}: no checkpoint to resume from; training begins at its first step")
        return None
    checkpoint = load_checkpoint(output / LAST)
    before, now = dataclasses.asdict(checkpoint.config), dataclasses.asdict(config)
    changed = {
        f"{part}.{name}": f"{part}.{name} {json.dumps(before[part][name])} -> {json.dumps(value)}"
        for part, values in now.items()
        for name, value in values.items()
        if value != before[part][name]
    }
    free = ("train.", "data.workers")
    fixed = [text for name, text in changed.items() if not name.startswith(free) or name in FIXED]
    if fixed:
        raise ConfigError(
            f"--resume: settings differ from the run's ({', '.join(fixed)}); give the same "
            f"--preset and --set as when it was started"
        )
    if checkpoint.data != digest:
        raise ConfigError(
            "--resume: the images or classes are not those that the run was started with; give the "
            "same --data and --val"
        )
    if changed:
        say(f"going on with other settings than before: {', '.join(changed.values())}")
    return checkpoint


def _nothing(line: str) -> None:
    """Prints nothing: only the first process does."""


def open_shared(
    config: DataConfig, data: Sequence[str], val: Sequence[str], seed: int, ranks: Ranks
) -> TrainingData:
    """Opens the data of a run once per machine; see `open_training_data` for the arguments.

    Raises:
        DataError: the data cannot be used; raised in the process that reads for its machine.
        SystemExit: the same, raised in the other processes, so that the error is printed once.
    """
    if ranks.world == 1:
        return open_training_data(config, data, val, seed)
    offer: TrainingData | Path | ComaskError | None = None
    if leads_its_machine():
        try:
            offer = open_training_data(config, data, val, seed)
            if isinstance(offer.train, PackedSource):  # `shapes` are only a seed and need no file.
                offer = write_arrays(offer)
        except ComaskError as error:
            offer = error
    offer = share_on_machine(offer)
    if isinstance(offer, ComaskError):
        if leads_its_machine():
            raise offer
        sys.exit(1)
    assert offer is not None
    if isinstance(offer, TrainingData):
        return offer
    try:
        opened: TrainingData = open_arrays(offer)
        return opened
    finally:
        share_on_machine(None)  # Wait until all processes have opened it.
        if leads_its_machine():
            shutil.rmtree(offer, ignore_errors=True)
