"""What `comask-eval` says on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from comask.data.source import not_decoded_text
from comask.errors import one_line
from comask.runtime.parity.judge import change_text, points_text

WIDE, NARROW = 120, 6  # columns that all twelve numbers take; how many of them fit into 80


def print_report(report: dict[str, Any], *, to_stderr: bool) -> None:
    """AP tables, then a verdict on each contestant with its reasons."""
    from rich.console import Console

    # no markup: names of files may look like it
    width = None if sys.stdout.isatty() else 140
    console = Console(stderr=to_stderr, width=width, markup=False, highlight=False)
    for task, title in (("bbox", "boxes"), ("segm", "masks")):
        heading = (
            f"{title}, AP points on {report['images']} images, the {report['max_detections']} best "
            f"detections of each"
        )
        console.print(_table(report, task, heading, wide=console.width >= WIDE))

    def say(text: str) -> None:
        console.print(one_line(text), soft_wrap=True)

    if report["not_decoded"]:
        say(f"{not_decoded_text(report)}; their annotations do not count")
    for name, reason in report["skipped"].items():
        say(f"skipped {name}: {reason}")
    for sentence in report["failures"]:
        say(f"FAIL {sentence}")
    if report["not_judged"]:
        word = "NOT JUDGED" if report["comparisons"] else "SCORED"
        say(f"{word} {report['reference']}: {report['not_judged']}")
    for name, found in report["comparisons"].items():
        if found["passed"] and report["not_judged"]:
            continue
        off = "below" if found["may_gain"] else "off"
        say(
            f"{'PASS' if found['passed'] else 'FAIL'} {name}: at most {found['largest']:.4f} points "
            f"{off} {report['reference']} (tolerance {found['tolerance']:g}), agreement "
            f"{found['agreement']:.4f}, {report['backends'][name]['detections']} detections"
        )
        for sentence in found["failures"]:
            say(f"     {sentence}")
    for name, trace in report["traces"].items():
        worst = max(trace["differences"], key=lambda entry: entry["relative"])
        say(
            f"traced {name}: {len(trace['differences'])} tensors of layers, the largest relative "
            f"error is {worst['relative']:.2g} ({worst['tensor']})"
        )


def _table(report: dict[str, Any], task: str, title: str, *, wide: bool) -> Any:
    """COCO's numbers of each contestant, its differences, and its AP before the second stage.

    The last columns are AP with COCO's 100 detections of an image, where more count; AP of the first
    stage; and, of boxes, AP of the plain average of the cells.
    """
    from rich import box
    from rich.table import Table

    from comask.evaluate import COCO_DETECTIONS, METRICS

    metrics = METRICS if wide else METRICS[:NARROW]
    caption = None if wide else f"a window of {WIDE} columns, --json or --report shows all twelve"
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("backend", no_wrap=True)
    capped = report["max_detections"] != COCO_DETECTIONS
    stages = {"first": "first", "plain": "plain"} if task == "bbox" else {"coarse": "first"}
    more = ([f"AP@{COCO_DETECTIONS}"] if capped else []) + list(stages)
    for metric in (*metrics, *more):
        table.add_column(metric, justify="right")
    for name, values in report["backends"].items():
        cells = [values[task][metric] for metric in metrics]
        cells += [values["coco_ap"][task]] if capped else []
        cells += [values[stage][task]["AP"] if values[stage] else -1.0 for stage in stages.values()]
        table.add_row(name, *map(points_text, cells))
        if name in report["comparisons"]:
            deltas = report["comparisons"][name]["deltas"][task]
            changes = [change_text(values[task][metric], deltas[metric]) for metric in metrics]
            table.add_row("  difference", *changes, style="dim")
    return table
