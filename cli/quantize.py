"""`comask quantize`: int8 graphs for a bundle, within a budget of AP."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comask.bundle import INT8_BASE, Bundle
from comask.calib.options import METHODS, QuantizeOptions
from comask.cli.command import command, option
from comask.cli.export import add_missing, print_exported, report
from comask.cli.options import (
    VERIFIED_IMAGES,
    check_outputs,
    gathered,
    json_option,
    verification_images,
    write_json,
)

if TYPE_CHECKING:
    from comask.calib.quantize import Int8Report

DEFAULT = QuantizeOptions(calib_data="")  # for what the help says
CALIBRATION = "Calibration"  # heading of options


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--data", default="shapes", metavar="DATA|shapes", aliases=("--val-data",),
        help="Data set to measure AP on. [shapes, for the demo]")  # fmt: skip
@option("--limit", type=click.IntRange(1), metavar="N", aliases=("--val-images",),
        help=f"Measure on N images of it at most. [{DEFAULT.limit}]")  # fmt: skip
@option("--max-loss", type=click.FloatRange(0), metavar="POINTS", aliases=("--ap-budget",),
        help=f"AP points that may be lost. [{DEFAULT.max_loss}]")  # fmt: skip
@option("--skip-cpu", is_flag=True, help="For a GPU: int8 need not be faster on this CPU.")
@json_option
@option("--calib-data", metavar="DATA|shapes", required=True, group=CALIBRATION,
        help="Images like those that the network will see.")  # fmt: skip
@option("--calib-limit", type=click.IntRange(1), metavar="N", aliases=("--calib-images",),
        group=CALIBRATION, help=f"Number of these images. [{DEFAULT.calib_limit}]")  # fmt: skip
@option("--calib-method", type=click.Choice(METHODS), group=CALIBRATION,
        help=f"How the range of each activation is chosen. [{DEFAULT.calib_method}]")  # fmt: skip
@option("--calib-seed", type=int, metavar="N", group=CALIBRATION,
        help=f"Seed of the choice of images. [{DEFAULT.calib_seed}]")  # fmt: skip
@gathered("options", QuantizeOptions)
def main(bundle: Path, data: str, options: QuantizeOptions, json_file: str | None) -> None:
    """Add int8 graphs to a bundle. They lose at most --max-loss AP points against PyTorch.

    Layers that cost too much accuracy stay in float, and the output says which and why. Where OpenVINO
    is installed, int8 that is not faster than fp32 and bf16 on this CPU is refused.

    \b
    comask quantize bundle --calib-data photos --data /data/coco --max-loss 0.3
    """
    check_outputs(json=json_file)
    from comask.calib.quantize import quantize

    to_stderr = json_file == "-"
    opened = Bundle.open(bundle)
    images = verification_images(data, VERIFIED_IMAGES)
    exported = add_missing(opened, (INT8_BASE,), images, quiet=True)
    print_exported(exported, to_stderr=to_stderr)
    changed, made = quantize(exported.bundle, options, data, report)
    _print_int8(changed.folder, made, to_stderr=to_stderr)
    write_json(json_file, dataclasses.asdict(changed.manifest))


def _print_int8(folder: Path, made: Int8Report, *, to_stderr: bool) -> None:
    """Prints what int8 costs in AP, what it saves, and which layers stay in float."""
    ap = ", ".join(
        f"{task} AP {made.ap[task]:.2f} ({made.ap[task] - value:+.2f})"
        for task, value in made.reference.items()
    )
    loss, error = made.loss
    click.echo(
        f"{folder}: int8 graphs, {made.layers - len(made.float_layers)} of {made.layers} layers in int8, "
        f"{made.bytes['int8'] / made.bytes['fp32']:.3f} times the size of fp32; on {made.images} images "
        f"{ap}: {loss:+.2f} ± {error:.2f} points lost to PyTorch, {made.budget:g} may be",
        err=to_stderr,
    )
    for kept in made.float_layers:
        click.echo(f"  float: {kept.layer}: {kept.reason}", err=to_stderr)
    if made.cpu_latency is None:
        click.echo(
            "warning: whether int8 is faster was not measured; OpenVINO does that on a CPU, and building "
            "engines of fp16 and int8 on a GPU",
            err=True,
        )
