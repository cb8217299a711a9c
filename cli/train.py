"""`comask-train`: from a data set to a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from comask.cli.options import command, open_source

from comask.errors import CheckpointError, ConfigError
from comask.presets import PRESETS, preset

if TYPE_CHECKING:
    from comask.config import Config
    from comask.data.source import InstanceSource
    from comask.training.checkpoint import Checkpoint

SHAPES_VAL_SEED = 1_000_000  # far from training seeds: other images


@command
@click.option(
    "--data",
    required=True,
    metavar="DIR|shapes",
    help="COCO-format folder, or shapes made on the fly.",
)
@click.option("--val", metavar="DIR", help="Validation data; else a seeded share of --data.")
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default="comask-r50",
              show_default=True)  # fmt: skip
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
def main(
    data: str,
    val: str | None,
    preset_name: str,
    output: Path,
    settings: tuple[str, ...],
    resume: bool,
) -> None:
    """Train CoMask on a COCO-format data set.

    The run's folder gets checkpoint-last.pt, checkpoint-best.pt (by mask AP), config.json,
    metrics.csv, eval.csv, losses.png and ap.png.

    \b
    comask-train --data shapes --preset shapes-tiny --output runs/shapes
    comask-train --data /data/coco --preset comask-r50 --output runs/r50 --set train.batch_size=4
    """
    from comask.config import override

    config = override(preset(preset_name), settings)
    source = open_source(
        data, "train", shapes_images=config.data.shapes_train, shapes_seed=config.train.seed
    )
    named = [s for s in settings if s.startswith("model.num_classes=")]
    if not named:
        classes = len(source.categories)
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, num_classes=classes)
        )
    elif config.model.num_classes != len(source.categories):
        raise ConfigError(
            f"{named[0]}: the data has {len(source.categories)} categories; leave the setting out"
        )
    checkpoint = _checkpoint_to_resume(output, config) if resume else None
    if not resume and (output / "checkpoint-last.pt").exists():
        raise CheckpointError(
            f"{output}: holds a run already; go on with --resume or give another --output"
        )
    _train(config, data, val, source, output, checkpoint)


def _train(
    config: Config,
    data: str,
    val: str | None,
    source: InstanceSource,
    output: Path,
    checkpoint: Checkpoint | None,
) -> None:
    import torch
    from comask.runtime.predictor import Predictor
    from comask.runtime.torch_session import torch_stages

    from comask.data.training_set import TrainingSet
    from comask.evaluate import CocoMetrics, evaluate
    from comask.models.comask import CoMask
    from comask.models.pretrained import load_backbone_weights
    from comask.training.loop import Trainer
    from comask.training.record import draw_curves

    train, val_source, val_indices = _split(config, data, val, source)
    dataset = TrainingSet(
        source,
        train,
        config.preprocess,
        flip_probability=config.data.flip_probability,
        seed=config.train.seed,
    )
    torch.manual_seed(config.train.seed)
    model = CoMask(config.model, config.preprocess)
    if checkpoint is None:
        load_backbone_weights(model.backbone, config.model.backbone, config.train.backbone_weights)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def score(model: CoMask) -> CocoMetrics:
        predictor = Predictor(torch_stages(model), config.preprocess)
        images = (val_source.image(i) for i in val_indices)
        return evaluate(val_source, val_indices, predictor.stream(images))

    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    click.echo(
        f"{len(train)} training images, {len(val_indices)} for validation, "
        f"{config.model.num_classes} classes"
    )
    trainer = Trainer(
        model,
        config,
        dataset,
        source.categories,
        output,
        evaluate=score if config.train.evaluate_every else None,
        resume=checkpoint,
    )
    trainer.train()
    pictures = draw_curves(output)
    if trainer.metrics:
        for task, values in trainer.metrics.values.items():
            parts = "  ".join(
                f"{name} {100 * value:.1f}" if value >= 0 else f"{name} -"
                for name, value in values.items()
            )
            click.echo(f"{task}: {parts}")
    names = ["checkpoint-last.pt", "checkpoint-best.pt", *(p.name for p in pictures)]
    click.echo("wrote " + ", ".join(str(output / name) for name in names))


def _split(
    config: Config, data: str, val: str | None, source: InstanceSource
) -> tuple[list[int], InstanceSource, list[int]]:
    """Training indices, and the validation source with its indices."""
    import numpy as np

    everything = list(range(len(source)))
    if val is not None or data == "shapes":
        val_source = open_source(
            val or data, "val", shapes_images=config.data.shapes_val, shapes_seed=SHAPES_VAL_SEED
        )
        if val_source.categories != source.categories:
            raise ConfigError(f"--val {val}: its categories differ from those of --data {data}")
        return everything, val_source, list(range(len(val_source)))
    count = max(1, round(len(source) * config.data.val_fraction))
    order = np.random.default_rng(config.train.seed).permutation(everything).tolist()
    return sorted(order[count:]), source, sorted(order[:count])


def _checkpoint_to_resume(output: Path, config: Config) -> Checkpoint:
    from comask.training.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(output / "checkpoint-last.pt")
    if checkpoint.config.model != config.model:
        changed = [
            f.name
            for f in dataclasses.fields(config.model)
            if getattr(config.model, f.name) != getattr(checkpoint.config.model, f.name)
        ]
        raise ConfigError(
            f"--resume: model settings differ from the run's ({', '.join(changed)}); give the same "
            f"--preset and --set as when it was started"
        )
    return checkpoint
