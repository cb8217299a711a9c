"""`comask bench`: how fast a bundle is, part by part, on each backend."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import click
import numpy as np

from comask.bundle import Bundle
from comask.cli.command import command, option
from comask.cli.options import (
    backends_option,
    check_outputs,
    find_files,
    json_option,
    plot_option,
    predictor_options,
    write_json,
)
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
from comask.runtime.bench.plots import draw_latency
from comask.runtime.bench.timing import PARTS, SUM, decoded

MOVED = {
    "--sweep": "comask sweep", "--grid": "comask sweep", "--max-loss": "comask sweep",
    "--soak": "comask soak",
}  # fmt: skip


@command(moved=MOVED)
@click.argument("bundle", type=click.Path(path_type=Path))
@backends_option("[all that run]")
@option("--data", type=click.Path(path_type=Path), metavar="DIR|FILE", aliases=("--images",),
        help="Images to measure on. [noise]")  # fmt: skip
@option("--size", metavar="HxW", help="Size of the noise. [the bundle's largest]")
@option("--runs", type=click.IntRange(1), default=20, metavar="N",
        help="Batches to measure per backend. [20]")  # fmt: skip
@option("--warmup", "warm_ups", type=click.IntRange(0), metavar="N",
        help="Batches before them. [until they get no faster]")  # fmt: skip
@option("--no-record", is_flag=True, help="Leave the bundle's manifest as it is.")
@plot_option
@json_option
@predictor_options(batch=1, views=False)
def main(
    bundle: Path,
    backends: tuple[str, ...],
    how: LoadOptions,
    data: Path | None,
    size: str | None,
    runs: int,
    warm_ups: int | None,
    no_record: bool,
    plot: Path | None,
    json_file: str | None,
) -> None:
    """Time a bundle part by part: p50, p90, p99, images per second and memory.

    Backends take turns, so trust the ratios more than the milliseconds. Memory is the peak of a fresh
    process that runs one backend.

    \b
    comask bench bundle --data photos --backend onnxruntime --backend tensorrt:fp16
    """
    check_outputs(plot=plot, json=json_file)
    if data and size:
        raise click.UsageError(
            "--size is the size of noise, and --data names images: give one of them"
        )
    opened = Bundle.open(bundle)
    most = runs * how.max_batch  # places in all batches
    pixels, subject = _pixels(data, size, opened.manifest.preprocess, most)
    names = runnable(opened, backends, how)
    report = measure_latency(
        opened, names, how, pixels, subject=subject, runs=runs, warm_ups=warm_ups
    )
    print_latency(report, to_stderr=json_file == "-")
    if plot is not None:
        draw_latency(report, plot)
    if not no_record:
        record_latency(report)
    write_json(json_file, dataclasses.asdict(report))


def _pixels(
    images: Path | None, size: str | None, preprocess: PreprocessConfig, most: int
) -> tuple[list[Pixels], str]:
    """Returns at most `most` images to run, and what they are; noise without `images`."""
    if images is not None:
        files = find_files(str(images), "image")
        pixels = [image for _, image in islice(decoded(files), most)]
        if not pixels:
            raise ImageError(f"--data {images}: none of them can be read")
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
    """Prints milliseconds by part, then a line per backend with everything else."""
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
