"""`comask-bench`: how fast a bundle is on each backend, and which setting is the fastest good one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from comask.cli.bench_sweep import run_sweep
from comask.cli.bench_timing import Timing, run_timing
from comask.cli.bench_work import Sweep
from comask.cli.options import command, json_option
from comask.cli.predictor_options import PredictorOptions, predictor_options

LOSS = 0.5  # AP points
SWEEP_ONLY = ("data", "limit", "max_loss", "grid")
TIMING_ONLY = ("images", "size", "warmup", "no_record")


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", "backends", multiple=True, metavar="NAME[:PRECISION]",
              help="Repeated; the first is the reference. [all that run]")  # fmt: skip
@predictor_options(batch=1)
@click.option("--images", type=click.Path(path_type=Path), metavar="DIR|FILE",
              help="Files to measure on. [noise]")  # fmt: skip
@click.option("--size", metavar="HxW", help="Of the noise. [the bundle's largest]")
@click.option("--runs", type=click.INT, default=20, metavar="N",
              help="Batches to measure of each backend or setting. [20]")  # fmt: skip
@click.option("--warmup", type=click.INT, metavar="N",
              help="Batches before them. [until they get no faster]")  # fmt: skip
@click.option("--no-record", is_flag=True, help="Leave the bundle's manifest as it is.")
@click.option("--sweep", is_flag=True, help="Weigh AP against time over a grid.")
@click.option("--data", metavar="DIR|shapes", help="--sweep: COCO-format folder with masks.")
@click.option("--limit", type=click.INT, metavar="N",
              help="--sweep: score N images. [all; shapes: 200]")  # fmt: skip
@click.option("--max-loss", type=click.FLOAT, metavar="POINTS",
              help=f"--sweep: AP that boxes, masks may lose. [{LOSS}]")  # fmt: skip
@click.option("--grid", multiple=True, metavar="NAME=A,B",
              help="--sweep: proposals, short-side, batch.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE",
              help="Draw the result: .png, .svg or .pdf.")  # fmt: skip
@json_option
def main(
    bundle: Path,
    backends: tuple[str, ...],
    how: PredictorOptions,
    runs: int,
    no_record: bool,
    sweep: bool,
    plot: Path | None,
    json_file: str | None,
    **rest: Any,
) -> None:
    """Time BUNDLE part by part: p50, p90, p99, images/s and memory.

    Backends take turns: trust the ratios more than the milliseconds. Files are read before. Memory
    is the peak of a fresh process with that backend alone.

    \b
    comask-bench bundle --images photos
    comask-bench bundle --sweep --data /data/coco --max-loss 0.3 --plot pareto.png
    comask-bench bundle --sweep --data shapes --grid proposals=100,50 --grid batch=1
    """
    _check_usage(backends, how, sweep, runs, {"no_record": no_record or None} | rest)
    if plot is not None:
        from comask.cli.bench_plots import check_plot

        check_plot(plot)
    if sweep:
        settings = Sweep(
            bundle=bundle, backends=backends, device=how.device, runs=runs, data=rest["data"],
            limit=rest["limit"], grid=rest["grid"],
            max_loss=LOSS if rest["max_loss"] is None else rest["max_loss"],
        )  # fmt: skip
        if not run_sweep(settings, plot, json_file):
            sys.exit(130)
        return
    timing = Timing(
        bundle=bundle, backends=backends, how=how, images=rest["images"], size=rest["size"],
        runs=runs, warm_ups=rest["warmup"], record=not no_record,
    )  # fmt: skip
    run_timing(timing, plot, json_file)


def _check_usage(
    backends: tuple[str, ...],
    how: PredictorOptions,
    sweep: bool,
    runs: int,
    rest: dict[str, Any],
) -> None:
    """Raises `click.UsageError` for numbers and combinations of options that make no sense.

    The ranges are here, and not in the options, lest click fill the help with them.
    """
    least = {"runs": 1, "warmup": 0, "limit": 1, "max_loss": 0}
    for name, value in ({"runs": runs} | rest).items():
        if name in least and value is not None and not value >= least[name]:
            raise click.UsageError(f"{_option(name)} {value}: expected at least {least[name]}")
    if "auto" in backends:
        raise click.UsageError("--backend auto: name the backends that are to be compared")
    if rest["images"] and rest["size"]:
        raise click.UsageError("--size is of the noise in place of --images: give one of them")
    for name in TIMING_ONLY if sweep else SWEEP_ONLY:
        if rest[name] not in (None, ()):
            raise click.UsageError(
                f"{_option(name)} {'does not go with' if sweep else 'needs'} --sweep"
            )
    if not sweep:
        return
    if rest["data"] is None:
        raise click.UsageError("--sweep needs --data: AP is measured on images with known objects")
    given = click.get_current_context().get_parameter_source("batch") != ParameterSource.DEFAULT
    batch = how.max_batch if given else None
    for name, value in (
        ("proposals", how.proposals), ("short-side", how.short_side), ("batch", batch)
    ):  # fmt: skip
        if value is not None:
            raise click.UsageError(f"--{name} does not go with --sweep: --grid {name}={value}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
