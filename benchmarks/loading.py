"""Measures how many images per second the training loader delivers, by number of workers.

python benchmarks/loading.py /data/coco --preset comask-r50 --workers 0,1,2
"""

from __future__ import annotations

import time

import click

from comask.data.loading import epoch_batches, load_batches
from comask.data.open_data import open_source
from comask.data.training_set import TrainingSet
from comask.presets import PRESETS, preset


def rate(dataset: TrainingSet, batch_size: int, workers: int, seconds: float) -> float:
    """Returns images per second after the first batch, so the start of the workers does not count."""
    delivered, epoch, started = 0, 0, None
    while True:
        batches = epoch_batches(dataset, batch_size, seed=0, epoch=epoch)
        with load_batches(dataset, batches * 8, workers=workers) as loaded:
            for batch in loaded:
                if started is None:
                    started = time.perf_counter()
                    continue
                delivered += len(batch.targets)
                if time.perf_counter() - started > seconds:
                    return delivered / (time.perf_counter() - started)
        epoch += 1


@click.command()
@click.argument("data")
@click.option("--preset", "name", type=click.Choice(list(PRESETS)), default="comask-r50")
@click.option("--workers", default="0,1,2", show_default=True)
@click.option("--seconds", default=20.0, show_default=True)
def main(data: str, name: str, workers: str, seconds: float) -> None:
    """Print the images per second for each number of workers."""
    config = preset(name)
    source = open_source(data, "train", shapes_images=config.data.shapes_train, shapes_seed=0)
    dataset = TrainingSet(
        source,
        list(range(len(source))),
        config.preprocess,
        config=config.data,
        seed=0,
    )
    click.echo("workers  images/s")
    for count in map(int, workers.split(",")):
        click.echo(f"{count:<7}  {rate(dataset, config.train.batch_size, count, seconds):.1f}")


if __name__ == "__main__":
    main()
