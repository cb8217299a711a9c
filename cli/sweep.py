"""`comask sweep`: AP and time over a grid of settings, and the fastest that is good enough."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from comask.bundle import Bundle
from comask.cli.command import command, option
from comask.cli.options import (
    SCORED_SHAPES,
    backends_option,
    check_outputs,
    device_option,
    json_option,
    plot_option,
    scored_source,
    write_json,
)
from comask.cli.tables import console, number, table
from comask.data.source import not_decoded_text
from comask.errors import ConfigError
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.names import Device
from comask.runtime.bench.grid import Grid
from comask.runtime.bench.latency import runnable
from comask.runtime.bench.plots import draw_sweep
from comask.runtime.bench.sweep import Sweep, SweepReport, SweepRow


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--data", required=True, metavar="DATA|shapes", help="Data set with masks.")
@option("--limit", type=click.IntRange(1), metavar="N",
        help=f"Score the first N images only. [all; shapes: {SCORED_SHAPES}]")  # fmt: skip
@option("--max-loss", type=click.FloatRange(0), default=0.5, metavar="POINTS",
        help="AP points that boxes and masks may lose. [0.5]")  # fmt: skip
@option("--grid", multiple=True, metavar="NAME=A,B",
        help="Values of proposals, short-side or batch. [by the bundle]")  # fmt: skip
@option("--runs", type=click.IntRange(1), default=20, metavar="N",
        help="Batches to time per setting. [20]")  # fmt: skip
@plot_option
@json_option
@backends_option("[all that run]")
@device_option
def main(
    bundle: Path,
    backends: tuple[str, ...],
    device: Device,
    data: str,
    limit: int | None,
    max_loss: float,
    grid: tuple[str, ...],
    runs: int,
    plot: Path | None,
    json_file: str | None,
) -> None:
    """Weigh AP against time over a grid of settings; name the fastest that is good enough.

    A setting is a backend with a number of proposals, a size and a batch. What was measured is also
    reported after an interruption.

    \b
    comask sweep bundle --data /data/coco --max-loss 0.3 --plot pareto.png
    comask sweep bundle --data shapes --grid proposals=100,50 --grid batch=1
    """
    check_outputs(plot=plot, json=json_file)
    opened = Bundle.open(bundle)
    settings = Grid.of(opened.manifest, parse_grid(grid))
    source, indices = scored_source(data, limit)
    # checks the data before anything takes long
    sweep = Sweep(opened, source, indices, device, runs)
    names = runnable(opened, backends, LoadOptions(device=device, max_batch=1))
    interruption = sweep.run(names, settings)
    report = sweep.report(data, max_loss, finished=interruption is None)
    print_sweep(report, to_stderr=json_file == "-")
    if plot is not None:
        draw_sweep(report, plot)
    write_json(json_file, dataclasses.asdict(report))
    if interruption is not None:
        raise interruption
    if not any(map(settings.holds, report.settings)):
        raise ConfigError(f"nothing of the grid runs here: {report.skipped[0].reason}")


def parse_grid(assignments: tuple[str, ...]) -> dict[str, list[int]]:
    """Returns the values that `--grid` gives, by `proposals`, `short-side` and `batch`.

    Raises:
        UsageError: when it is no such assignment.
    """
    given = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        numbers = text.split(",")
        known = name in ("proposals", "short-side", "batch")
        if not known or not all(n.strip().isdecimal() and int(n) for n in numbers):
            raise click.UsageError(
                f"--grid {assignment}: expected proposals, short-side or batch, and numbers from 1 "
                f"on, as in --grid proposals=1000,300"
            )
        given[name] = [int(n) for n in numbers]
    return given


def print_sweep(report: SweepReport, *, to_stderr: bool) -> None:
    """Prints all settings by falling speed, what was skipped, and the choice."""
    out = console(to_stderr=to_stderr)
    rows = table(
        f"AP points on {report.images} images, against milliseconds", "", "backend",
        "pro-\nposals", "short\nside", "batch", "box\nAP", "mask\nAP", "loss", "ms an\nimage",
        "ms a\nbatch", "ratio",
    )  # fmt: skip
    for row in report.settings:
        counts = (row.proposals, row.short_side, row.batch)
        figures = (
            row.box_ap, row.mask_ap, row.loss, row.ms_per_image, row.ms_per_batch, row.ratio,
        )  # fmt: skip
        rows.add_row(
            _signs(row), row.backend, *map(str, counts), *map(number, figures),
            style="bold" if row.chosen else None,
        )  # fmt: skip
    out.print(rows, "")
    out.print("> fastest within the loss, * on the Pareto front, = the bundle's own setting")
    if report.not_decoded:
        out.print(not_decoded_text(report.not_decoded, report.images))
    for skipped in report.skipped:
        out.print(f"skipped: {skipped.setting}: {skipped.reason}")
    if not report.finished:
        out.print("interrupted: only a part of the grid was measured")
    out.print(f"{report.verdict}\n  {report.command}\n  {report.python}")
    out.print(str(report.machine))


def _signs(row: SweepRow) -> str:
    """Returns the marks of a setting: chosen, on the front, the bundle's own."""
    signs = (">" if row.chosen else "", "*" if row.on_front else "", "=" if row.reference else "")
    return "".join(signs)
