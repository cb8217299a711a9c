"""How far a result scatters over seeds: mean and deviation of runs that differ in nothing else."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from comask.evaluate import TASKS
from comask.training.curves import TASK_NAMES
from comask.training.record import Evaluation, read_evaluations
from comask.whole_file import write_whole

SHOWN = ("AP", "AP50", "AP75")


def show_seeds(folders: list[Path], file: Path) -> Iterator[str]:
    """Writes the last evaluation of each run to a JSON file, and gives lines for the user.

    The deviation is that of a sample, with n - 1 below.

    Args:
        folders: of finished runs, one per seed.
        file: to write, `{metric: {"values": [...], "mean": m, "deviation": s}}` in AP points.
    """
    lasts = {folder.name: read_evaluations(folder)[-1:] for folder in folders}
    runs = {name: found[0] for name, found in lasts.items() if found}
    if not runs:
        yield "no evaluation to compare: train.evaluate_every is 0"
        return
    report = {}
    for name, values in _points(list(runs.values())).items():
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        report[name] = {"values": values, "mean": statistics.fmean(values), "deviation": deviation}
        text = f"{report[name]['mean']:.2f}"
        yield f"{name}: {text}" + (f" ± {deviation:.2f}" if len(values) > 1 else "")
    finite = {
        name: {k: v if k == "values" or math.isfinite(v) else None for k, v in entry.items()}  # type: ignore[arg-type]
        for name, entry in report.items()
    }
    content = {"runs": list(runs), "points": finite}
    write_whole(file, (json.dumps(content, indent=2) + "\n").encode())
    yield f"over {len(runs)} seeds, mean ± deviation; wrote {file}"


def _points(runs: list[Evaluation]) -> dict[str, list[float]]:
    """AP points of all runs by metric; what a run lacks, or has no objects for, is left out."""
    found: dict[str, list[float]] = {}
    for task in TASKS:
        for metric in SHOWN:
            found[f"{TASK_NAMES[task]} {metric}"] = [r.points("final", task, metric) for r in runs]
    if all("plain" in run.values for run in runs):
        found["box AP, weighted minus plain average of the cells"] = [
            run.points("final", "bbox") - run.points("plain", "bbox") for run in runs
        ]
    return {name: values for name, values in found.items() if all(map(math.isfinite, values))}
