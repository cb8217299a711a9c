"""`comask-bench --sweep`: AP and time over a grid of settings, and the fastest that is good enough."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from comask.bundle import Bundle
from comask.cli.options import write_json
from comask.cli.tables import console, number, table
from comask.data.source import not_decoded_text
from comask.errors import ConfigError
from comask.runtime.backends import Device, LoadOptions
from comask.runtime.bench.grid import Grid
from comask.runtime.bench.latency import runnable
from comask.runtime.bench.plots import draw_sweep
from comask.runtime.bench.sweep import Sweep, SweepReport, SweepRow

SHAPES_IMAGES = 200  # of those that comask-eval scores, too


def sweep_settings(
    bundle: Path,
    backends: tuple[str, ...],
    *,
    device: Device,
    data: str,
    limit: int | None,
    grid: tuple[str, ...],
    runs: int,
    max_loss: float,
    plot: Path | None,
    json_file: str | None,
) -> None:
    """Scores, times, prints and draws, also what there is when it is interrupted.

    Args:
        bundle: to measure.
        backends: as `Predictor.load` takes them, the reference first; empty for all that run.
        device: to run on.
        data: a folder, or `shapes`.
        limit: images to score; None for all.
        grid: assignments `name=a,b`.
        runs: batches to time of each setting.
        max_loss: AP points that boxes and masks may lose.
        plot: picture to draw.
        json_file: see `write_json`.

    Raises:
        ConfigError: the bundle cannot run what the grid names, or nothing of it runs here.
        DataError: the data has other classes than the bundle, or nothing to score.
    """
    from comask.cli.evaluate import SHAPES_SEED
    from comask.data.open_data import open_source

    opened = Bundle.open(bundle)
    settings = Grid.of(opened.manifest, parse_grid(grid))
    number = limit or SHAPES_IMAGES
    source = open_source(data, "val", shapes_images=number, shapes_seed=SHAPES_SEED)
    indices = list(range(min(limit or len(source), len(source))))
    sweep = Sweep(
        opened, source, indices, device, runs
    )  # checks the data before anything takes long
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
    """The values that `--grid` gives, by `proposals`, `short-side` and `batch`.

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
    """All settings by falling speed, what was skipped, and the choice."""
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
    """What a setting is, in signs."""
    signs = (">" if row.chosen else "", "*" if row.on_front else "", "=" if row.reference else "")
    return "".join(signs)
