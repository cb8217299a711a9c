"""`comask-bench --sweep`: AP and time over a grid of settings, and the fastest that is good enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from comask.cli.bench_backends import runnable
from comask.cli.bench_work import Sweep, Work
from comask.cli.options import write_json
from comask.config import require_count
from comask.errors import ConfigError
from comask.runtime.backends import LoadOptions

if TYPE_CHECKING:
    from comask.bundle import Manifest

SHAPES_IMAGES = 200  # of those that comask-eval scores, too
PROPOSALS = (1.0, 1 / 2, 1 / 4, 1 / 8)  # of the bundle's
SHORT_SIDES = (0.8, 0.6)  # of the bundle's, which comes first
BATCHES = (1, 4)


def run_sweep(sweep: Sweep, plot: Path | None, json_file: str | None) -> None:
    """Scores, prints and draws, also what there is when it is interrupted.

    Raises:
        ConfigError: the bundle cannot run what the grid names, or nothing of it runs here.
        DataError: the data has other classes than the bundle, or nothing to score.
    """
    from comask.bundle import Bundle
    from comask.cli.bench_sweep_report import sweep_report
    from comask.cli.bench_tables import print_sweep
    from comask.cli.evaluate import SHAPES_SEED
    from comask.data.open_source import open_source
    from comask.runtime.parity.scores import labels_in_data

    opened = Bundle.open(sweep.bundle)
    batches, settings = parse_grid(sweep.grid, opened.manifest)
    number = sweep.limit or SHAPES_IMAGES
    source = open_source(sweep.data, "val", shapes_images=number, shapes_seed=SHAPES_SEED)
    indices = list(range(min(sweep.limit or len(source), len(source))))
    labels_in_data(opened.manifest, source)  # before anything takes long
    own = LoadOptions(device=sweep.device, max_batch=1, proposals=None, short_side=None)
    names = runnable(opened, sweep.backends, own)
    work = Work(sweep, opened, source, indices)
    interruption = work.run(names, settings, batches)
    report = sweep_report(work, finished=interruption is None)
    print_sweep(report, to_stderr=json_file == "-")
    if plot is not None:
        from comask.cli.bench_plots import draw_sweep

        draw_sweep(report, plot)
    write_json(json_file, report)
    if interruption is not None:
        raise interruption
    asked = {entry.setting for entry in work.scored if entry.setting.batch in batches}
    if not any((s.proposals, s.short_side) in settings for s in asked):
        raise ConfigError(f"nothing of the grid runs here: {work.skipped[0][1]}")


def parse_grid(
    assignments: tuple[str, ...], manifest: Manifest
) -> tuple[list[int], list[tuple[int, int]]]:
    """What `--grid` names; for the rest, parts of what the bundle has.

    Short sides are multiples of the canvas's, lest part of the network's work be on padding.

    Returns:
        batches, and pairs of proposals and short side.

    Raises:
        UsageError: an assignment is none.
        ConfigError: the bundle has no such proposals or short side.
    """
    side, multiple = manifest.preprocess.short_side, manifest.preprocess.pad_multiple
    values = {
        "proposals": [max(1, round(part * manifest.model.proposals)) for part in PROPOSALS],
        "short-side": [
            side,
            *(max(multiple, round(part * side / multiple) * multiple) for part in SHORT_SIDES),
        ],
        "batch": list(BATCHES),
    }
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        numbers = text.split(",")
        if name not in values or not all(n.strip().isdecimal() and int(n) for n in numbers):
            raise click.UsageError(
                f"--grid {assignment}: expected proposals, short-side or batch, and numbers from 1 "
                f"on, as in --grid proposals=1000,300"
            )
        values[name] = [int(n) for n in numbers]
    for count in values["proposals"]:
        require_count("--grid proposals", count, manifest.model.proposals)
    for length in values["short-side"]:
        manifest.preprocess.resized(length)  # raises
    pairs = [(count, side) for side in values["short-side"] for count in values["proposals"]]
    return list(dict.fromkeys(values["batch"])), list(dict.fromkeys(pairs))
