"""`comask-bench`: how fast a bundle is, which setting is the fastest good one, and whether it lasts."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import click
import numpy as np
from click.core import ParameterSource

from comask.bundle import Bundle
from comask.cli.options import check_folders, command, find_files, json_option, write_json
from comask.cli.predictor_options import predictor_options
from comask.cli.soak import soak_backend
from comask.cli.sweep import sweep_settings
from comask.cli.tables import console, mib, number, table
from comask.config import PreprocessConfig
from comask.errors import ImageError, one_line
from comask.preprocess import Pixels
from comask.runtime.backends import LoadOptions
from comask.runtime.bench.latency import (
    LatencyReport,
    measure_latency,
    record_latency,
    runnable,
)
from comask.runtime.bench.plots import check_plot, draw_latency
from comask.runtime.bench.timing import PARTS, SUM, decoded

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
    images: Path | None,
    size: str | None,
    runs: int,
    warmup: int | None,
    no_record: bool,
    sweep: bool,
    data: str | None,
    limit: int | None,
    max_loss: float | None,
    grid: tuple[str, ...],
    soak: float | None,
    plot: Path | None,
    json_file: str | None,
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
    _check_usage("--sweep" if sweep else "--soak" if soak is not None else "")
    check_folders(plot=plot, json=json_file)
    if plot is not None:
        check_plot(plot)
    if data is not None:
        sweep_settings(
            bundle, backends, device=how.device, data=data, limit=limit, grid=grid, runs=runs,
            max_loss=LOSS if max_loss is None else max_loss, plot=plot, json_file=json_file,
        )  # fmt: skip
    elif soak is not None:
        backend = backends[0] if backends else "auto"
        soak_backend(bundle, backend, how, images, minutes=soak, plot=plot, json_file=json_file)
    else:
        time_backends(
            bundle, backends, how, images, size=size, runs=runs, warm_ups=warmup,
            record=not no_record, plot=plot, json_file=json_file,
        )  # fmt: skip


def time_backends(
    bundle: Path,
    backends: tuple[str, ...],
    how: LoadOptions,
    images: Path | None,
    *,
    size: str | None,
    runs: int,
    warm_ups: int | None,
    record: bool,
    plot: Path | None,
    json_file: str | None,
) -> None:
    """Measures, prints, draws and records what `comask-bench` does without --sweep and --soak."""
    opened = Bundle.open(bundle)
    most = runs * how.max_batch  # places in all batches
    pixels, subject = _pixels(images, size, opened.manifest.preprocess, most)
    names = runnable(opened, backends, how)
    report = measure_latency(
        opened, names, how, pixels, subject=subject, runs=runs, warm_ups=warm_ups
    )
    print_latency(report, to_stderr=json_file == "-")
    if plot is not None:
        draw_latency(report, plot)
    if record:
        record_latency(report)
    write_json(json_file, dataclasses.asdict(report))


def _pixels(
    images: Path | None, size: str | None, preprocess: PreprocessConfig, most: int
) -> tuple[list[Pixels], str]:
    """At most `most` images to run, and what they are; noise without `images`."""
    if images is not None:
        files = find_files(str(images), "image")
        pixels = [image for _, image in islice(decoded(files), most)]
        if not pixels:
            raise ImageError(f"--images {images}: none of them can be read")
        return pixels, f"{len(pixels)} images of {images}"
    height, width = preprocess.short_side, preprocess.max_side
    if size is not None:
        parts = size.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise click.UsageError(f"--size {size}: expected HxW in pixels, as in 800x1333")
        height, width = map(int, parts)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return [noise], f"noise of {height}x{width}"


def print_latency(report: LatencyReport, *, to_stderr: bool) -> None:
    """Milliseconds by part, then one line a backend with everything else."""
    out = console(to_stderr=to_stderr)
    title = "milliseconds" if report.batch == 1 else f"milliseconds of a batch of {report.batch}"
    heads = (head.replace("+", "\n+") for head in (*PARTS.values(), SUM))
    parts = table(title, "backend", "", *heads)
    rest = table(
        "batch after batch", "backend", "images\n/s", "ratio", "outside\nstages",
        "detections\nan image", "cores\nbusy", "memory\nMiB", "GPU\nMiB",
    )  # fmt: skip
    streams = table("as a stream of frames", "backend", "ms\np50", "images\n/s", "GPU\nMiB")
    for name, found in report.backends.items():
        for rank in ("p50", "p90", "p99"):
            values = (number(getattr(found.milliseconds[part], rank)) for part in (*PARTS, SUM))
            parts.add_row(name if rank == "p50" else "", rank, *values)
        rest.add_row(
            name,
            number(found.images_per_second),
            f"{found.ratio:.2f}",
            f"{100 * found.outside_stages:.2f} %",
            f"{found.detections_per_image:.1f}",
            f"{found.cores_busy:.1f}",
            mib(found.resident_bytes),
            mib(found.gpu_bytes),
        )
        if stream := found.stream:
            rate = f"{stream.images_per_second:.1f}"
            streams.add_row(name, number(stream.milliseconds.p50), rate, mib(stream.gpu_bytes))
    for made in (parts, rest, streams):
        if made.row_count:
            out.print(made, "")
    canvases = ", ".join(f"{height}x{width}" for height, width in report.canvases)
    out.print(
        f"{one_line(report.subject)} on canvases of {canvases}; {report.runs} runs of each in turn; "
        f"{report.machine}"
    )


def _check_usage(mode: str) -> None:
    """Raises `click.UsageError` for numbers and combinations of options that make no sense.

    The ranges are here, and not in the options, so that click does not fill the help with them.
    """
    values = click.get_current_context().params
    least = {"runs": 1, "warmup": 0, "limit": 1, "max_loss": 0}
    for name, minimum in least.items():
        if (value := values[name]) is not None and not value >= minimum:
            raise click.UsageError(f"{_option(name)} {value}: expected at least {minimum}")
    soak, backends = values["soak"], values["backends"]
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
    for name in ("proposals", "short_side", "batch"):
        if _given(name):
            option = _option(name)
            raise click.UsageError(
                f"{option} does not go with --sweep: --grid {option[2:]}={values[name]}"
            )


def _given(name: str) -> bool:
    """Whether an option is on the command line."""
    return click.get_current_context().get_parameter_source(name) != ParameterSource.DEFAULT


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
