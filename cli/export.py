"""`comask-export`: from a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from comask.cli.options import command, json_option, write_json

from comask.errors import ComaskError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERIFY_SEED = 2_000_000  # other images than training and validation see


@command
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="The bundle's folder."
)
@click.option("--score-threshold", type=click.FloatRange(0, 1, max_open=True),
              help="Drop detections at or below this in the graph; default: the model's.")  # fmt: skip
@click.option("--val-data", default="shapes", show_default=True, metavar="DIR|shapes",
              help="Images on which the graphs are compared with PyTorch.")  # fmt: skip
@click.option("--verify-images", type=click.IntRange(1), default=3, show_default=True,
              help="How many of them.")  # fmt: skip
@click.option("--diagnostics", is_flag=True, help="Also output what the collaboration changed.")
@json_option
def main(
    checkpoint: Path,
    output: Path,
    score_threshold: float | None,
    val_data: str,
    verify_images: int,
    diagnostics: bool,
    json_file: str | None,
) -> None:
    """Export CHECKPOINT to a bundle: two ONNX graphs, weights and a manifest.

    The graphs are compared with PyTorch on real images, at several sizes and as a batch; a bundle
    whose outputs differ is not written.

    \b
    comask-export runs/shapes/checkpoint-best.pt --output bundle
    """
    import json

    from comask.export.pipeline import export_bundle

    from comask.training.checkpoint import load_checkpoint

    state = load_checkpoint(checkpoint)
    bundle = export_bundle(
        state,
        checkpoint,
        output,
        _images(val_data, verify_images),
        score_threshold=score_threshold,
        diagnostics=diagnostics,
        report=lambda line: click.echo(line, err=True),
    )
    proof = bundle.manifest.verification
    click.echo(
        f"{output}: graphs equal PyTorch on {proof['images']} images: {proof['detections']} "
        f"detections, boxes within {proof['box']:.1e} px, scores within {proof['score']:.1e}, "
        f"mask pixels within {proof['mask']:.1e}, maps within "
        f"{max(proof['relative'].values()):.1e} relative",
        err=json_file == "-",
    )
    if not proof["detections"]:
        click.echo(
            "warning: PyTorch found nothing in these images, so no detection was compared; name "
            "better ones by --val-data, or lower --score-threshold",
            err=True,
        )
    write_json(json_file, json.loads(bundle.manifest.to_json()))


def _images(data: str, count: int) -> list[NDArray[np.uint8]]:
    from comask.data.open_source import open_source

    source = open_source(data, "val", shapes_images=4 * count, shapes_seed=VERIFY_SEED)
    # those with most objects: an empty image proves little
    busiest = sorted(range(len(source)), key=lambda i: -len(source.annotations(i)))
    images = [source.image(i) for i in busiest[:count]]
    if not images:
        raise ComaskError(f"--val-data {data}: holds no images")
    return images
