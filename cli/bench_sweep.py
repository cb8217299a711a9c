"""`comask-bench --sweep`: AP and time over a grid of settings, and the fastest that is good enough."""

from __future__ import annotations

import dataclasses
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from comask.cli.bench_timing import runnable
from comask.cli.bench_work import Scored, Sweep, Work, choose, pareto_front
from comask.cli.options import write_json
from comask.config import require_count
from comask.errors import ConfigError
from comask.runtime.backends import LoadOptions

if TYPE_CHECKING:
    from comask.bundle import Manifest
    from comask.cli.bench_work import Work

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


def sweep_report(work: Work, *, finished: bool) -> dict[str, Any]:
    """Everything that was measured, the fastest setting first, and the choice."""
    from comask.runtime.bench.machine import describe_machine

    sweep, scored = work.sweep, work.scored
    reference = scored[0]
    chosen, front = choose(scored, sweep.max_loss), pareto_front(scored)
    command, python = usage(
        sweep.bundle, chosen.setting.backend, sweep.options(chosen.setting, work.bundle.manifest)
    )
    return {
        "bundle": str(sweep.bundle),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(sweep.device),
        "data": sweep.data,
        "images": work.images,
        "not_decoded": work.asked - work.images,
        "runs": sweep.runs,
        "max_loss": sweep.max_loss,
        "settings": [
            {
                **dataclasses.asdict(entry.setting),
                "box_ap": entry.box_ap,
                "mask_ap": entry.mask_ap,
                "loss": entry.loss,
                "ms_per_image": entry.ms_per_image,
                "ms_per_batch": entry.ms_per_batch,
                "ratio": reference.ms_per_image / entry.ms_per_image,
                "reference": entry is reference,
                "on_front": entry in front,
                "chosen": entry is chosen,
            }
            for entry in sorted(scored, key=lambda s: s.ms_per_image)
        ],
        "skipped": [{"setting": str(s), "reason": reason} for s, reason in work.skipped],
        "finished": finished,
        "verdict": verdict(chosen, reference, sweep.max_loss),
        "command": command,
        "python": python,
    }


def verdict(chosen: Scored, reference: Scored, max_loss: float) -> str:
    """The choice in a line."""
    within = f"within {max_loss:g} AP points of {reference.setting}"
    if chosen is reference:
        return f"fastest {within}: that setting itself"
    box, mask = chosen.box_ap - reference.box_ap, chosen.mask_ap - reference.mask_ap
    return (
        f"fastest {within}: {chosen.setting}, {chosen.ms_per_image:.2f} ms an image, "
        f"{reference.ms_per_image / chosen.ms_per_image:.2f} times as fast, box AP {box:+.2f}, "
        f"mask AP {mask:+.2f}"
    )


def usage(bundle: Path, backend: str, how: LoadOptions) -> tuple[str, str]:
    """The command line of `comask-infer` and the Python expression that run a setting."""
    given = {
        "device": how.device, "batch": how.max_batch, "proposals": how.proposals,
        "short-side": how.short_side,
    }  # fmt: skip
    options = "".join(f" --{name} {value}" for name, value in given.items() if value is not None)
    keywords = "".join(
        f", {name}={value!r}"
        for name, value in dataclasses.asdict(how).items()
        if value is not None and name != "on_mismatch"
    )
    return (
        f"comask-infer {shlex.quote(str(bundle))} INPUT --output DIR --backend {backend}{options}",
        f"Predictor.load({str(bundle)!r}, {backend!r}{keywords})",
    )
