"""`comask-bench --soak`: whether a backend that runs for long keeps its memory and its speed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from comask.cli.options import Interruption, find_files, write_json
from comask.errors import ComaskError, ImageError, one_line
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions

if TYPE_CHECKING:
    from comask.runtime.bench.soak import Encoded, Soaked

MOST_IMAGES = 16  # a round of them is over soon


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """What is asked for.

    Attributes:
        bundle: to run.
        backend: as `Predictor.load` takes it.
        how: it runs.
        images: a file or a folder of them; None for noise.
        minutes: to go on for.
    """

    bundle: Path
    backend: str
    how: LoadOptions
    images: Path | None
    minutes: float


def run_soak(wanted: Soak, plot: Path | None, json_file: str | None) -> None:
    """Runs, judges, prints and draws; SIGINT and SIGTERM end it early.

    Raises:
        ComaskError: something grew beyond its limit, the run broke down, or was too short to judge.
    """
    from comask.cli.bench_tables import print_soak
    from comask.progress import Progress
    from comask.runtime.bench.machine import describe_machine
    from comask.runtime.bench.soak import soak
    from comask.runtime.bench.vitals import check_vitals

    check_vitals()
    stop = Interruption()
    machine = describe_machine(wanted.how.device)  # before there is load
    with Predictor.open(wanted.bundle, wanted.backend, wanted.how) as predictor:
        images, subject = _images(wanted.images, predictor)
        total = max(1, round(60 * wanted.minutes))
        with stop.on_signal(), Progress("soaking", total, unit="seconds") as progress:
            shown, samples = 0, [0.0]

            def tell(seconds: float, note: str) -> None:
                nonlocal shown
                samples.append(seconds)
                if len(samples) == 3:  # the first round is slower
                    _warn_if_short(samples[2] - samples[1], 60 * wanted.minutes)
                whole = min(int(seconds), total)
                progress.advance(whole - shown, note)
                shown = whole

            soaked = soak(
                predictor, images, 60 * wanted.minutes, stopped=lambda: bool(stop.signal), tell=tell
            )
        report = {
            "bundle": str(wanted.bundle),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine,
            "runs_as": predictor.stages.backend,
            "device": predictor.stages.device,
            "subject": subject,
            "batch": predictor.max_batch,
            "proposals": wanted.how.proposals,  # null: the bundle's
            "short_side": wanted.how.short_side,
            "minutes": wanted.minutes,
            "interrupted": bool(stop.signal),
            **_judged(soaked),
        }
    print_soak(report, to_stderr=json_file == "-")
    if plot is not None and report["times"]:
        from comask.cli.bench_plots import draw_soak

        draw_soak(report, plot)
    write_json(json_file, report)
    if stop.signal:
        click.echo(f"interrupted: {report['verdict']}", err=True)
        sys.exit(128 + stop.signal)
    if not report["passed"]:
        raise ComaskError(report["verdict"])


def _warn_if_short(interval: float, total: float) -> None:
    """Says after two rounds already that there will be too few samples to judge.

    Args:
        interval: seconds between two samples.
        total: seconds of the run.
    """
    from comask.runtime.bench.vitals import LEAST, PARTS, WARM_UP

    samples = total * (1 - WARM_UP) / interval
    if samples < LEAST * PARTS:
        click.echo(
            f"warning: a round takes {interval:.2g} s, so this run will be too short to judge; give "
            f"{_longer(total / 60, samples)}",
            err=True,
        )


def _longer(minutes: float, samples: float) -> str:
    """The option for a run that can be judged, where so many minutes give too few samples."""
    from comask.runtime.bench.vitals import LEAST, PARTS

    return f"--soak {1.2 * minutes * LEAST * PARTS / samples:.2g} or more"


def _images(source: Path | None, predictor: Predictor) -> tuple[list[Encoded], str]:
    """What a round goes through, and what that is in words; broken images are a part of it.

    Raises:
        ImageError: none can be read.
    """
    from comask.preprocess import decode_image
    from comask.runtime.bench.soak import broken_images, noise_images

    if source is None:
        images = noise_images(predictor.preprocess)
        subject = f"noise in {len(images)} sizes"
    else:
        files = find_files(str(source), "image")
        images = list(files[:: max(1, -(-len(files) // MOST_IMAGES))])
        subject = f"{len(images)} images of {source}"
    readable: Encoded | None = None
    for image in images:
        try:
            decode_image(image)
        except ImageError as error:
            click.echo(f"skipped: {one_line(error)}", err=True)
        else:
            readable = image
    if readable is None:
        raise ImageError(f"--images {source}: none of them can be read")
    content = readable.read_bytes() if isinstance(readable, Path) else readable
    broken = broken_images(content)
    return [*images, *broken], f"{subject}, and {len(broken)} broken images"


def _judged(soaked: Soaked) -> dict[str, Any]:
    """The report's part on what was run, and what grew."""
    import numpy as np

    from comask.runtime.bench.vitals import LEAST, LIMITS, PARTS, WARM_UP, growths, warmed_up

    waited = soaked.series.get("waited", np.empty(0))
    judged = {name: series for name, series in soaked.series.items() if name in LIMITS}
    found = growths(soaked.times, judged)
    grown = [str(growth) for growth in found.values() if not growth.passed]
    minutes = soaked.seconds / 60
    if soaked.problem:
        grown.append(f"the run broke down after {minutes:.1f} minutes: {soaked.problem}")
    if grown:
        verdict = "; ".join(grown)
    elif not found:
        count = int(warmed_up(soaked.times).sum())
        verdict = (
            f"too short to judge: {count} samples after the warm-up in {minutes:.2g} minutes, expected "
            f"{LEAST * PARTS}; give {_longer(minutes, max(1, count))}"
        )
    else:
        verdict = f"nothing grew beyond its limit in {minutes:.3g} minutes"
    return {
        "seconds": soaked.seconds,
        "waited": float(np.median(waited)) if len(waited) else None,
        "rounds": soaked.rounds,
        "images": soaked.images,
        "detections": soaked.detections,
        "unreadable": soaked.unreadable,
        "judged": bool(found),
        "passed": bool(found) and not grown,
        "verdict": verdict,
        "warm_up_seconds": WARM_UP * float(soaked.times[-1]) if len(soaked.times) else None,
        "growth": {
            name: {
                "name": growth.limit.name,
                "unit": growth.limit.unit,
                "relative": growth.limit.relative,
                "before": growth.before,
                "after": growth.after,
                "grown": growth.grown,
                "allowed": growth.limit.allowed,
                "passed": growth.passed,
            }
            for name, growth in found.items()
        },
        "times": soaked.times.tolist(),
        "series": {name: series.tolist() for name, series in soaked.series.items()},
    }
