"""`comask shapes`: writes the synthetic data set."""

from __future__ import annotations

from pathlib import Path

import click

from comask.cli.command import command, option


@command
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@option("--count", "images", type=click.IntRange(1), default=1000, metavar="N", aliases=("--images",),
        help="Number of images. [1000]")  # fmt: skip
@option(
    "--seed", type=click.IntRange(0), default=0, metavar="N", help="Seed of the random images. [0]"
)
@option("--clutter", is_flag=True, help="Write shapes-clutter: thin, crowded objects.")
def main(folder: Path, images: int, seed: int, clutter: bool) -> None:
    """Write the synthetic data set `shapes` to a folder in COCO format.

    The folder gets images/ and annotations/instances.json. Equal seeds give equal files.

    \b
    comask shapes data --count 200 --seed 1
    """
    from comask.data.coco import write_coco
    from comask.data.shapes import ShapesSource
    from comask.data.shapes_clutter import ShapesClutterSource
    from comask.progress import Progress

    kind = ShapesClutterSource if clutter else ShapesSource
    with Progress("writing", images, unit="images") as progress:
        write_coco(kind(num_images=images, seed=seed), folder, progress.advance)
    click.echo(f"{images} images in {folder}")
