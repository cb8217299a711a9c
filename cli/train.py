"""`comask-train`: from a data set to a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource
from comask.cli.interruption import Interruption
from comask.cli.options import command

from comask.bundle import BEST
from comask.errors import CheckpointError, ConfigError, TrainingError
from comask.locks import locked
from comask.presets import PRESETS, preset
from comask.whole_file import write_whole

if TYPE_CHECKING:
    from comask.config import Config
    from comask.data.source import InstanceSource
    from comask.models.comask import CoMask
    from comask.training.checkpoint import Checkpoint
    from comask.training.distributed import Ranks
    from comask.training.loop import Trainer
    from comask.training.validation import Validation, Validator

LOCK_SECONDS = 20.0  # loading processes of a killed run hold its lock for up to five
# A run that goes on may change how it trains, but not what its steps and state mean.
FIXED = {
    "train.batch_size", "train.seed", "train.optimizer", "train.ema_decay", "train.weights",
    "train.channels_last", "train.momentum", "train.adamw_beta2", "train.weight_decay",
}  # fmt: skip


def _assignments(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """`--set` of `key value` is wrong here, before click wonders at the value alone."""
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value}: --set takes key=value, as in train.epochs=12")
    return values


@command
@click.option("--data", metavar="DIR|shapes", help="COCO-format folder, or shapes made on the fly.")
@click.option("--val", metavar="DIR", help="Validation data; else a seeded share of --data.")
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default="comask-r50",
              show_default=True)  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", callback=_assignments,
              help="Change a setting.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
@click.option("--eval-only", is_flag=True, help="Score the run's best checkpoint on --val.")
@click.option("--print-config", is_flag=True, help="Print all settings as JSON, and stop.")
def main(
    data: str | None,
    val: str | None,
    preset_name: str,
    output: Path | None,
    settings: tuple[str, ...],
    resume: bool,
    eval_only: bool,
    print_config: bool,
) -> None:
    """Train CoMask on a COCO-format data set.

    The run's folder gets checkpoint-last.pt, checkpoint-best.pt (by mask AP), report.html with its
    pictures, config.json, metrics.csv and eval.csv. Several processes train together by torchrun.

    \b
    comask-train --data shapes --preset shapes-tiny --output runs/shapes
    comask-train --data /data/coco --val /data/coco --output runs/r50 --set train.batch_size=4
    comask-train --data mine --output runs/mine --set train.weights=runs/r50/checkpoint-best.pt
    torchrun --nproc-per-node 4 -m comask.cli.train --data /data/coco --val /data/coco --output r50
    """
    from comask.config_reading import override

    config = override(preset(preset_name), settings)
    if print_config:
        click.echo(json.dumps(dataclasses.asdict(config), indent=2))
        return
    missing = [name for name, value in (("--data", data), ("--output", output)) if value is None]
    if data is None or output is None:
        raise click.UsageError(f"missing option {' and '.join(missing)}")
    if resume and eval_only:
        raise click.UsageError("--resume trains and --eval-only does not: give one of them")

    from comask.training.distributed import join, share_from_first

    with join() as ranks:
        if eval_only:
            context = click.get_current_context()
            if context.get_parameter_source("preset_name") is ParameterSource.COMMANDLINE:
                raise click.UsageError(
                    "--eval-only takes the settings of the checkpoint: no --preset"
                )
            _evaluate(data, val, output, settings, ranks)
        else:
            with _folder(output), _lock(output) if ranks.first else nullcontext():
                share_from_first(None)  # the others look into the folder when it is locked
                _train(config, data, val, settings, output, resume, ranks)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Makes a folder and those above it; what is still empty in the end goes again."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # one that is not empty
            for folder in made:
                folder.rmdir()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in the run's folder.

    Raises:
        TrainingError: when another process trains there.
    """
    try:
        with locked(folder, patience=LOCK_SECONDS):
            yield
    except BlockingIOError as error:
        raise TrainingError(
            f"{folder}: another process trains there; wait for it, end it, or give another --output"
        ) from error


def _train(
    config: Config,
    data: str,
    val: str | None,
    settings: tuple[str, ...],
    output: Path,
    resume: bool,
    ranks: Ranks,
) -> None:
    import torch

    from comask.data.open_source import data_digest
    from comask.data.training_set import TrainingSet
    from comask.models.comask import CoMask
    from comask.training.loop import LAST, Trainer
    from comask.training.machine import fit_to_machine

    if not resume and (output / LAST).exists():
        raise CheckpointError(
            f"{output}: holds a run already; go on with --resume or give another --output"
        )
    train_source, train, val_source, val_indices = _sources(config, data, val, ranks)
    config = _with_classes(config, settings, train_source)
    images = data_digest((train_source, train), (val_source, val_indices))
    checkpoint = _checkpoint_to_resume(output, config, images, ranks) if resume else None
    dataset = TrainingSet(
        train_source,
        train,
        config.preprocess,
        flip_probability=config.data.flip_probability,
        seed=config.train.seed,
    )
    torch.manual_seed(config.train.seed)
    model = CoMask(config.model, config.preprocess)
    if checkpoint is None:
        _import_weights(model, config, train_source, ranks)
    model = fit_to_machine(model, config, ranks)
    validator = _validator(val_source, val_indices, config, ranks, output)

    if ranks.first:
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        write_whole(output / "config.json", text.encode())
    _say(
        ranks,
        f"{len(train)} training images, {len(val_indices)} for validation, "
        f"{config.model.num_classes} classes, {ranks.world} x {ranks.device.type}",
    )
    stop = Interruption()
    trainer = Trainer(
        model,
        config,
        dataset,
        train_source.categories,
        output,
        data=images,
        ranks=ranks,
        evaluate=validator if config.train.evaluate_every else None,
        resume=checkpoint,
        signal=lambda: stop.signal,
    )
    finished = False
    if checkpoint:
        finished = trainer.step >= trainer.total_steps or trainer.out_of_patience
        if finished:
            _say(ranks, f"finished already at step {trainer.step}; nothing to do")
        else:
            _say(ranks, f"going on from step {trainer.step} of {trainer.total_steps}")
    with stop.on_signal():
        trainer.train()
    _end(trainer, output, ranks, finished=finished)


def _import_weights(model: CoMask, config: Config, source: InstanceSource, ranks: Ranks) -> None:
    """Gives a new run its weights, and says what it should know of them."""
    from comask.training.import_weights import import_weights

    backbone = config.model.backbone
    if ranks.device.type == "cpu" and not backbone.endswith("-slim"):
        _say(
            ranks,
            f"warning: no GPU; with model.backbone={backbone} training takes days on a CPU, "
            f"--preset coco-slim minutes",
        )
    weights = import_weights(model, config.train.weights, source.categories)
    if config.train.weights != "none":
        _say(ranks, *weights.lines())
    elif config.model.frozen_stages:
        _say(
            ranks,
            f"warning: model.frozen_stages={config.model.frozen_stages} freezes random weights; "
            f"from scratch, give model.frozen_stages=0 and model.backbone_norm=group",
        )


def _end(trainer: Trainer, output: Path, ranks: Ranks, *, finished: bool) -> None:
    """Says how the training ended; exits where a signal ended it.

    Args:
        trainer: that has trained.
        output: the run's folder.
        ranks: of which the first one speaks.
        finished: whether there was nothing to do.
    """
    from comask.training.loop import LAST

    if trainer.ended_by:
        place = f"step {trainer.step} of {trainer.total_steps}"
        if ranks.first:
            click.echo(f"interrupted after {place}: --resume goes on there", err=True)
        sys.exit(128 + trainer.ended_by)
    if finished or not ranks.first:
        return
    if trainer.out_of_patience:
        click.echo(
            f"stopped at step {trainer.step}: no better mask AP in {trainer.stale} evaluations"
        )
    if trainer.validation:
        _show(trainer.validation)
    click.echo("wrote " + ", ".join(str(output / name) for name in (BEST, LAST, "report.html")))


def _evaluate(
    data: str, val: str | None, output: Path, settings: tuple[str, ...], ranks: Ranks
) -> None:
    """Scores a finished run; its own settings hold."""
    from comask.training.checkpoint import load_checkpoint, model_from_checkpoint

    if settings:
        raise ConfigError(f"--set {settings[0]}: --eval-only takes the settings of the checkpoint")
    checkpoint = load_checkpoint(output / BEST)
    train_source, _, val_source, val_indices = _sources(checkpoint.config, data, val, ranks)
    if train_source.categories != checkpoint.categories:
        raise ConfigError(f"--data {data}: its categories are not those of {output / BEST}")
    model = model_from_checkpoint(checkpoint).to(ranks.device)
    validator = _validator(val_source, val_indices, checkpoint.config, ranks, None)
    validation = validator(model, checkpoint.step)
    if ranks.first:
        click.echo(f"{output / BEST}, step {checkpoint.step}, on {len(val_indices)} images")
        _show(validation)


def _validator(
    source: InstanceSource, indices: list[int], config: Config, ranks: Ranks, output: Path | None
) -> Validator:
    from comask.training.validation import Validator

    return Validator(
        source,
        indices,
        config.preprocess,
        mask_threshold=config.model.mask_threshold,
        ranks=ranks,
        pictures=output / "pictures" if output else None,
    )


def _say(ranks: Ranks, *lines: str) -> None:
    if ranks.first:
        for line in lines:
            click.echo(line)


def _show(validation: Validation) -> None:
    """The twelve numbers of both tasks, and what the collaboration changed."""
    final, first = validation.final.values, validation.first.values
    for task, values in final.items():
        parts = "  ".join(
            f"{name} {100 * value:.1f}" if value >= 0 else f"{name} -"
            for name, value in values.items()
        )
        click.echo(f"{task}: {parts}")
    box, mask = ([100 * v[task]["AP"] for v in (first, final)] for task in ("bbox", "segm"))
    click.echo(
        f"collaboration: box AP {box[0]:.1f} -> {box[1]:.1f}, mask AP {mask[0]:.1f} -> {mask[1]:.1f}"
    )


def _sources(
    config: Config, data: str, val: str | None, ranks: Ranks
) -> tuple[InstanceSource, list[int], InstanceSource, list[int]]:
    """The sound part of the data; what is wrong with the rest is printed."""
    from comask.data.open_source import training_sources
    from comask.data.problems import describe

    source, train, val_source, val_indices, problems = training_sources(
        config.data, data, val, config.train.seed
    )
    if ranks.first:
        for line in describe(problems):
            click.echo(line, err=True)
    return source, train, val_source, val_indices


def _with_classes(config: Config, settings: tuple[str, ...], source: InstanceSource) -> Config:
    """`config` for as many classes as the data has."""
    classes = len(source.categories)
    named = [s for s in settings if s.startswith("model.num_classes=")]
    if named and config.model.num_classes != classes:
        raise ConfigError(f"{named[0]}: the data has {classes} categories; leave the setting out")
    model = dataclasses.replace(config.model, num_classes=classes)
    return dataclasses.replace(config, model=model)


def _checkpoint_to_resume(
    output: Path, config: Config, images: str, ranks: Ranks
) -> Checkpoint | None:
    """The run's last checkpoint; None where there is none yet, as when a job is queued again."""
    from comask.training.checkpoint import load_checkpoint
    from comask.training.loop import LAST

    if not (output / LAST).exists():
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
    if checkpoint.data != images:
        raise ConfigError(
            "--resume: the images or classes are not those that the run was started with; give the "
            "same --data and --val"
        )
    if changed:
        _say(ranks, f"going on with other settings than before: {', '.join(changed.values())}")
    return checkpoint


if __name__ == "__main__":
    main()
