"""`comask-shapes`: writes the synthetic data set."""

from __future__ import annotations

from pathlib import Path

import click

from comask.cli.options import command


@command
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--images", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(folder: Path, images: int, seed: int) -> None:
    """Write the synthetic set `shapes` to FOLDER in COCO format.

    FOLDER gets images/ and annotations/instances.json; equal seeds give equal files.
    """
    from comask.data.coco import write_coco
    from comask.data.shapes import ShapesSource
    from comask.progress import Progress

    with Progress("writing", images, unit="images") as progress:
        write_coco(ShapesSource(num_images=images, seed=seed), folder, progress.advance)
    click.echo(f"{images} images in {folder}")
