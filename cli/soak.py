"""`comask soak`: whether a backend that runs for long keeps its memory and its speed."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import click

from comask.cli.command import command, option
from comask.cli.options import (
    RUNS,
    Interruption,
    check_outputs,
    find_files,
    json_option,
    plot_option,
    predictor_options,
    write_json,
)
from comask.cli.tables import console, number, table
from comask.config import PreprocessConfig
from comask.errors import ComaskError, ImageError, one_line
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions
from comask.runtime.bench.machine import require_proc
from comask.runtime.bench.plots import draw_soak
from comask.runtime.bench.soak import Encoded, SoakReport, broken_images, noise_images, soak
from comask.runtime.bench.timing import decoded

MOST_IMAGES = 16  # a round of them is over soon


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--minutes", type=click.FloatRange(0, min_open=True), default=30.0, metavar="N",
        help="How long to run. [30]")  # fmt: skip
@option("--data", type=click.Path(path_type=Path), metavar="DIR|FILE", aliases=("--images",),
        help="Images to run. [noise]")  # fmt: skip
@plot_option
@json_option
@option("--backend", "backends", multiple=True, metavar="NAME[:PRECISION]", group=RUNS,
        help="The backend to run. [auto]")  # fmt: skip
@predictor_options(batch=1, views=False)
def main(
    bundle: Path,
    backends: tuple[str, ...],
    how: LoadOptions,
    data: Path | None,
    minutes: float,
    plot: Path | None,
    json_file: str | None,
) -> None:
    """Run one backend for a long time, and fail when memory, threads, files or latency grow.

    Ctrl-C ends it early, and what was measured is judged.

    \b
    comask soak bundle --minutes 30 --data photos --backend tensorrt:fp16 --plot soak.png
    """
    check_outputs(plot=plot, json=json_file)
    if len(backends) > 1:
        raise click.UsageError(
            "--backend: a soak runs one backend, whose memory it measures: name one"
        )
    if not math.isfinite(minutes):
        raise click.UsageError(f"--minutes {minutes}: expected a number of minutes")
    require_proc()
    stop = Interruption()
    backend = backends[0] if backends else "auto"
    with Predictor.open(bundle, backend, how) as predictor:
        chosen, subject = _images(data, predictor.preprocess)
        with stop.on_signal():
            report = soak(
                predictor, chosen, minutes, bundle=bundle, how=how, subject=subject,
                stopped=lambda: bool(stop.signal),
            )  # fmt: skip
    print_soak(report, to_stderr=json_file == "-")
    if plot is not None and report.times:
        draw_soak(report, plot)
    write_json(json_file, dataclasses.asdict(report))
    if stop.signal:
        click.echo(f"interrupted: {report.verdict}", err=True)
        sys.exit(128 + stop.signal)
    if not report.passed:
        raise ComaskError(report.verdict)


def _images(source: Path | None, preprocess: PreprocessConfig) -> tuple[list[Encoded], str]:
    """Returns the images of a round, broken ones among them, and a description of them.

    Raises:
        ImageError: none can be read.
    """
    if source is None:
        images = noise_images(preprocess)
        subject = f"noise in {len(images)} sizes"
    else:
        files = find_files(str(source), "image")
        images = list(files[:: max(1, -(-len(files) // MOST_IMAGES))])
        subject = f"{len(images)} images of {source}"
    sound = [image for image, _ in decoded(images)]
    if not sound:
        raise ImageError(f"--data {source}: none of them can be read")
    broken = broken_images(sound[-1])
    return [*images, *broken], f"{subject}, and {len(broken)} broken images"


def print_soak(report: SoakReport, *, to_stderr: bool) -> None:
    """Prints how each series developed, and the verdict."""
    out = console(to_stderr=to_stderr)
    rows = table("soak", "", "unit", "after\nwarm-up", "at the\nend", "growth", "limit", "")
    for growth in report.growth.values():
        rows.add_row(
            growth.name, growth.unit,
            *(number(level / growth.scale) for level in (growth.before, growth.after)),
            f"{growth.grown:+.2%}" if growth.relative else f"{growth.grown:+g}",
            f"{growth.allowed:.0%}" if growth.relative else f"{growth.allowed:g}",
            "" if growth.passed else "TOO MUCH",
        )  # fmt: skip
    if rows.row_count:
        out.print(rows, "")
    out.print(
        f"{report.images} images in {report.rounds} rounds and {report.seconds / 60:.1f} minutes on "
        f"{report.runs_as} ({report.device}): {one_line(report.subject)}; {report.detections} "
        f"detections, {report.unreadable} attempts to read a broken image; {report.machine}"
    )
    if report.waited:
        out.print(f"other processes used {report.waited:.0%} of the time; the latencies exclude it")
    if not report.detections:
        out.print("warning: nothing was found in these images, so masks were not under load")
    if report.passed:
        out.print(report.verdict)
