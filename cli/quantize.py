"""`comask-export --precision int8`: its options, and what is said of the result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from comask.calib.options import METHODS, QuantizeOptions
from comask.cli.options import gathered

if TYPE_CHECKING:
    from pathlib import Path

    from comask.bundle import Bundle
    from comask.calib.quantize import Int8Report

DEFAULT = QuantizeOptions()


def quantize_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options, which reach the command as `int8`: `QuantizeOptions`."""
    options = (
        click.option("--calib-data", metavar="DIR|shapes",
                     help="int8: images that tell activations' ranges."),
        click.option("--calib-images", type=click.IntRange(1), metavar="N",
                     help=f"int8: how many. [{DEFAULT.calib_images}]"),
        click.option("--calib-method", type=click.Choice(METHODS), metavar="METHOD",
                     help=f"{'|'.join(METHODS)} [{DEFAULT.calib_method}]"),
        click.option("--calib-seed", type=int, metavar="N",
                     help=f"int8: of their choice. [{DEFAULT.calib_seed}]"),
        click.option("--val-images", type=click.IntRange(1), metavar="N",
                     help=f"int8: images for AP. [≤ {DEFAULT.val_images}]"),
        click.option("--ap-budget", type=click.FloatRange(0), metavar="POINTS",
                     help=f"int8: AP that may be lost. [{DEFAULT.ap_budget}]"),
    )  # fmt: skip
    function = gathered("int8", QuantizeOptions)(function)
    for option in reversed(options):
        function = option(function)
    return function


def quantize_bundle(
    bundle: Bundle, options: QuantizeOptions, val_data: str, *, to_stderr: bool
) -> Bundle:
    """Adds int8 graphs to a bundle, and says what came of it.

    Raises:
        ComaskError: see `comask.calib.quantize.quantize`.
    """
    from comask.calib.quantize import quantize

    changed, made = quantize(bundle, options, val_data, functools.partial(click.echo, err=True))
    _print_int8(bundle.folder, made, to_stderr=to_stderr)
    return changed


def _print_int8(folder: Path, made: Int8Report, *, to_stderr: bool) -> None:
    """What int8 costs in AP, what it saves, and which layers stayed float."""
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
    click.echo(
        "warning: whether int8 is faster than fp16 was not measured; building engines of both on a GPU "
        "does that",
        err=True,
    )
