"""`comask-bench`: how fast a bundle is, which setting is the fastest good one, and whether it lasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from comask.cli.bench_soak import Soak, run_soak
from comask.cli.bench_sweep import run_sweep
from comask.cli.bench_timing import Timing, run_timing
from comask.cli.bench_work import Sweep
from comask.cli.options import check_folders, command, json_option
from comask.cli.predictor_options import predictor_options
from comask.runtime.backends import LoadOptions

LOSS = 0.5  # AP points
# Options that are not for every mode, by those that they are for.
MODES = {
    "images": ("", "--soak"),
    "runs": ("", "--sweep"),
    **dict.fromkeys(("size", "warmup", "no_record"), ("",)),
    **dict.fromkeys(("data", "limit", "max_loss", "grid"), ("--sweep",)),
}


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
@click.option("--soak", type=click.FLOAT, metavar="MINUTES",
              help="Run one backend for long; fail if it grows.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE",
              help="Draw the result: .png, .svg or .pdf.")  # fmt: skip
@json_option
def main(
    bundle: Path,
    backends: tuple[str, ...],
    how: LoadOptions,
    runs: int,
    no_record: bool,
    sweep: bool,
    soak: float | None,
    plot: Path | None,
    json_file: str | None,
    **rest: Any,
) -> None:
    """Time BUNDLE part by part: p50, p90, p99, images/s and memory.

    Backends take turns: trust the ratios more than the milliseconds. Files are read before. Memory
    is the peak of a fresh process with that backend alone.

    \b
    comask-bench bundle --images photos
    comask-bench bundle --soak 30 --images photos --plot soak.png
    comask-bench bundle --sweep --data /data/coco --max-loss 0.3 --plot pareto.png
    comask-bench bundle --sweep --data shapes --grid proposals=100,50 --grid batch=1
    """
    mode = "--sweep" if sweep else "--soak" if soak is not None else ""
    _check_usage(mode, backends, how, {"runs": runs, "soak": soak} | rest)
    check_folders(plot=plot, json=json_file)
    if plot is not None:
        from comask.cli.bench_plots import check_plot

        check_plot(plot)
    if sweep:
        settings = Sweep(
            bundle=bundle, backends=backends, device=how.device, runs=runs, data=rest["data"],
            limit=rest["limit"], grid=rest["grid"],
            max_loss=LOSS if rest["max_loss"] is None else rest["max_loss"],
        )  # fmt: skip
        run_sweep(settings, plot, json_file)
        return
    if soak is not None:
        wanted = Soak(
            bundle=bundle, backend=backends[0] if backends else "auto", how=how,
            images=rest["images"], minutes=soak,
        )  # fmt: skip
        run_soak(wanted, plot, json_file)
        return
    timing = Timing(
        bundle=bundle, backends=backends, how=how, images=rest["images"], size=rest["size"],
        runs=runs, warm_ups=rest["warmup"], record=not no_record,
    )  # fmt: skip
    run_timing(timing, plot, json_file)


def _check_usage(
    mode: str, backends: tuple[str, ...], how: LoadOptions, values: dict[str, Any]
) -> None:
    """Raises `click.UsageError` for numbers and combinations of options that make no sense.

    The ranges are here, and not in the options, lest click fill the help with them.
    """
    least = {"runs": 1, "warmup": 0, "limit": 1, "max_loss": 0}
    for name, minimum in least.items():
        if (value := values[name]) is not None and not value >= minimum:
            raise click.UsageError(f"{_option(name)} {value}: expected at least {minimum}")
    soak = values["soak"]
    if soak is not None and not 0 < soak < float("inf"):
        raise click.UsageError(f"--soak {soak:g}: expected minutes above 0")
    if mode == "--sweep" and soak is not None:
        raise click.UsageError("--soak does not go with --sweep")
    if mode == "--soak" and len(backends) > 1:
        raise click.UsageError("--soak runs one backend, whose memory it measures: name one")
    if mode != "--soak" and "auto" in backends:
        raise click.UsageError("--backend auto: name the backends that are to be compared")
    for name, modes in MODES.items():
        if mode not in modes and _given(name):
            problem = f"does not go with {mode}" if mode else f"needs {modes[0]}"
            raise click.UsageError(f"{_option(name)} {problem}")
    if values["images"] and values["size"]:
        raise click.UsageError("--size is of the noise in place of --images: give one of them")
    if mode != "--sweep":
        return
    if values["data"] is None:
        raise click.UsageError("--sweep needs --data: AP is measured on images with known objects")
    batch = how.max_batch if _given("batch") else None
    for name, value in (
        ("proposals", how.proposals), ("short-side", how.short_side), ("batch", batch)
    ):  # fmt: skip
        if value is not None:
            raise click.UsageError(f"--{name} does not go with --sweep: --grid {name}={value}")


def _given(name: str) -> bool:
    """Whether an option is on the command line."""
    return click.get_current_context().get_parameter_source(name) != ParameterSource.DEFAULT


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
