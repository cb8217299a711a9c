"""`comask train`: from a data set to a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from comask.bundle import BEST
from comask.cli.command import command, option
from comask.cli.options import Interruption
from comask.errors import ConfigError
from comask.presets import PRESETS, preset

if TYPE_CHECKING:
    from comask.config import Config
    from comask.evaluate import CocoMetrics
    from comask.training.distributed import Ranks
    from comask.training.loop import Trainer
    from comask.training.validation import Validation

OWN_SETTINGS = "--eval-only takes the settings of the checkpoint"


def _assignments(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Refuses `--set key value` before click complains about the value alone."""
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value}: --set takes key=value, as in train.epochs=12")
    return values


@command
@option("--data", multiple=True, metavar="DATA|shapes",
        help="Your data set (COCO, Roboflow, CVAT, YOLO, Pascal VOC, LabelMe), or shapes for synthetic "
             "images; repeat it to join several by class name.")  # fmt: skip
@option("--val", multiple=True, metavar="DATA",
        help="Validation data, may be repeated. [the data's own part, else a share: data.val_fraction, "
             "data.val_group]")  # fmt: skip
@option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default="comask-r50",
        metavar="NAME", help=f"One of {', '.join(PRESETS)}. [comask-r50]")  # fmt: skip
@option("--config", "config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE", help="Settings over the preset's: YAML, or a run's config.json.")  # fmt: skip
@option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the run.")
@option("--set", "settings", multiple=True, metavar="KEY=VALUE", callback=_assignments,
        help="Change a setting; --print-config lists all.")  # fmt: skip
@option("--track", multiple=True, type=click.Choice(["tensorboard", "wandb", "mlflow"]),
        help="Send losses and AP there as well.")  # fmt: skip
@option("--seeds", type=click.IntRange(2), metavar="N",
        help="Train with N seeds, and show how far AP scatters.")  # fmt: skip
@option("--resume", is_flag=True, help="Continue from the run's last checkpoint.")
@option("--eval-only", is_flag=True, help="Score the run's best checkpoint on --val.")
@option("--print-config", is_flag=True, help="Print all settings as JSON, and stop.")
def main(
    data: tuple[str, ...],
    val: tuple[str, ...],
    preset_name: str,
    config_file: Path | None,
    output: Path | None,
    settings: tuple[str, ...],
    track: tuple[str, ...],
    seeds: int | None,
    resume: bool,
    eval_only: bool,
    print_config: bool,
) -> None:
    """Train CoMask on a data set.

    The run's folder gets checkpoint-last.pt, checkpoint-best.pt (by mask AP), report.html with its
    pictures, training_images.jpg, config.json, metrics.csv, eval.csv and analysis.json. Several
    processes train together by torchrun. On a CPU take the preset shapes-tiny or coco-slim.

    \b
    comask train --data shapes --preset shapes-tiny --output runs/shapes
    comask train --data /data/coco --val /data/coco --output runs/r50 --set train.batch_size=4
    comask train --data mine --output runs/mine --set train.weights=runs/r50/checkpoint-best.pt
    torchrun --nproc-per-node 4 -m comask.cli.train --data /data/coco --val /data/coco --output r50
    """
    from comask.config_reading import override, read_config

    config = preset(preset_name)
    config = override(read_config(config_file, config) if config_file else config, settings)
    if print_config:
        click.echo(json.dumps(dataclasses.asdict(config), indent=2))
        return
    missing = [name for name, value in (("--data", data), ("--output", output)) if not value]
    if not data or output is None:
        raise click.UsageError(f"missing option {' and '.join(missing)}")
    for name, given in (("--resume", resume), ("--seeds", seeds)):
        if given and eval_only:
            raise click.UsageError(f"{name} trains and --eval-only does not: give one of them")
    if seeds and not val:
        _require_validation(data)

    from comask.training.distributed import join

    with join() as ranks:
        if eval_only:
            context = click.get_current_context()
            if context.get_parameter_source("preset_name") is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{OWN_SETTINGS}: no --preset")
            if settings or config_file:
                what = f"--set {settings[0]}" if settings else "--config"
                raise ConfigError(f"{what}: {OWN_SETTINGS}")
            _evaluate(data, val, output, ranks)
            return
        from comask.training.api import run_folder

        with run_folder(output, lock=ranks.first):
            _train(config, data, val, output, ranks, seeds, settings, track, resume=resume)


def _require_validation(data: tuple[str, ...]) -> None:
    """Checks that all seeds are validated on the same images.

    Raises:
        click.UsageError: the images would depend on the seed.
    """
    from comask.data.layouts import has_validation
    from comask.data.open_data import GENERATED

    for name in data:
        if name not in GENERATED and not has_validation(Path(name)):
            raise click.UsageError(
                f"--seeds needs --val: {name} has no part for validation, and the share that is set "
                f"aside depends on the seed"
            )


def _train(
    config: Config,
    data: tuple[str, ...],
    val: tuple[str, ...],
    output: Path,
    ranks: Ranks,
    seeds: int | None,
    settings: tuple[str, ...],
    track: tuple[str, ...],
    *,
    resume: bool,
) -> None:
    """Trains once, or once per seed, each in its own folder; then shows how far AP scatters."""
    from comask.training.callbacks import open_trackers
    from comask.training.distributed import share_from_first
    from comask.training.record import show_seeds
    from comask.training.run import train_run

    first, stop = config.train.seed, Interruption()
    runs = {output: first}
    if seeds:
        runs = {output / f"seed-{seed}": seed for seed in range(first, first + seeds)}
    for folder, seed in runs.items():
        if seeds and ranks.first:
            folder.mkdir(exist_ok=True)
            click.echo(f"seed {seed}, {seed - first + 1} of {seeds}")
        share_from_first(None)  # the other processes wait until the first one holds the lock
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        with stop.on_signal():
            trainer = train_run(
                seeded, data, val, folder, ranks, settings=settings, resume=resume, say=click.echo,
                callbacks=open_trackers(track) if ranks.first else (), signal=lambda: stop.signal,
            )  # fmt: skip
        _end(trainer, folder, ranks)
    if seeds and ranks.first:
        for line in show_seeds([*runs], output / "seeds.json"):
            click.echo(line)


def _end(trainer: Trainer, output: Path, ranks: Ranks) -> None:
    """Prints how the training ended; exits if a signal ended it."""
    from comask.training.loop import LAST

    if trainer.ended_by:
        place = f"step {trainer.step} of {trainer.total_steps}"
        if ranks.first:
            click.echo(f"interrupted after {place}: continue with --resume", err=True)
        sys.exit(128 + trainer.ended_by)
    if not ranks.first or not trainer.trained:
        return
    if trainer.out_of_patience:
        click.echo(
            f"stopped at step {trainer.step}: no better mask AP in {trainer.stale} evaluations"
        )
    if trainer.validation:
        _show(trainer.validation, trainer.config.model.collaboration)
    click.echo("wrote " + ", ".join(str(output / name) for name in (BEST, LAST, "report.html")))


def _evaluate(data: tuple[str, ...], val: tuple[str, ...], output: Path, ranks: Ranks) -> None:
    """Scores a finished run with the settings of its checkpoint."""
    from comask.training.run import evaluate_run

    validation, checkpoint, images = evaluate_run(data, val, output, ranks)
    if ranks.first:
        click.echo(f"{output / BEST}, step {checkpoint.step}, on {images} images")
        _show(validation, checkpoint.config.model.collaboration)


def _show(validation: Validation, collaboration: str) -> None:
    """Prints the twelve numbers of both tasks, and what the second stage adds."""
    from comask.evaluate import COCO_DETECTIONS, points_text

    final = validation.final
    if final.coco_ap:
        box, mask = (points_text(final.coco_ap[task]) for task in ("bbox", "segm"))
        click.echo(
            f"with the best {final.max_detections} detections of an image; with COCO's "
            f"{COCO_DETECTIONS} box AP is {box}, mask AP {mask}"
        )
    for task, values in final.values.items():
        parts = "  ".join(f"{name} {points_text(value)}" for name, value in values.items())
        click.echo(f"{task}: {parts}")
    if validation.first is None or validation.plain is None:
        return

    def ap(metrics: CocoMetrics, task: str) -> str:
        return points_text(metrics.values[task]["AP"])

    plain = f" (plain average of the same cells {ap(validation.plain, 'bbox')})"
    click.echo(
        f"second stage: box AP {ap(validation.first, 'bbox')} -> {ap(final, 'bbox')}"
        f"{plain if collaboration == 'weighted' else ''}, "
        f"mask AP {ap(validation.first, 'segm')} -> {ap(final, 'segm')}"
    )


if __name__ == "__main__":
    main()
