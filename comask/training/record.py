"""Writes and reads a run's tables and its analysis of errors, and compares seeds.

The process may be killed at any moment. Rows are appended, and a truncated row is dropped on reading.
Files that are not appended to are replaced as a whole.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from comask.config_reading import from_dict
from comask.error_analysis import ErrorAnalysis
from comask.errors import TrainingError
from comask.evaluate import METRICS, TASK_NAMES, TASKS, CocoMetrics
from comask.files import write_whole

# `eval.csv` has this value if the data has no such objects. Spreadsheets and pandas recognise it.
NONE = "n/a"
SHOWN = ("AP", "AP50", "AP75")
ANALYSIS = "analysis.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimiser step, a row of `metrics.csv`.

    Attributes:
        step: the step's number, from 1.
        epoch: the epoch, from 0.
        rate: the learning rate.
        losses: the weighted losses by name; their sum is the loss.
        seconds: the time of the step; 0 if it was not measured.
        data_seconds: the part of it that was spent waiting for data.
    """

    step: int
    epoch: int
    rate: float
    losses: dict[str, float]
    seconds: float = 0.0
    data_seconds: float = 0.0

    @property
    def numbers(self) -> dict[str, float]:
        """The loss and its parts, by their columns."""
        parts = {f"loss_{name}": value for name, value in self.losses.items()}
        return {"loss": sum(self.losses.values()), **parts}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation, several rows of `eval.csv`.

    Attributes:
        step: the number of optimiser steps before the evaluation.
        epoch: the epoch, from 0.
        values: `values[stage][task][metric]`, as in `CocoMetrics`; the stages are those of `Validation`.
    """

    step: int
    epoch: int
    values: dict[str, dict[str, dict[str, float]]]

    def points(self, stage: str, task: str, metric: str = "AP") -> float:
        """Returns a metric in points (0..100); NaN if the data has no such objects."""
        value = self.values[stage][task][metric]
        return 100 * value if value >= 0 else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The analysis of errors at the end of a run, the content of `analysis.json`.

    Attributes:
        step: the number of optimiser steps before it.
        errors: what is wrong with the model.
    """

    step: int
    errors: ErrorAnalysis


class RunRecord:
    """Appends to the run's tables `metrics.csv`, `eval.csv` and `per_class.csv`; writes `analysis.json`.

    Args:
        folder: the run's folder.
        keep_until: the last step whose rows are kept; a resumed run writes later ones again.
    """

    def __init__(self, folder: Path, *, keep_until: int) -> None:
        self._metrics = folder / "metrics.csv"
        self._eval = folder / "eval.csv"
        self._per_class = folder / "per_class.csv"
        self._folder = folder
        analysis = read_analysis(folder)
        if analysis and analysis.step > keep_until:
            (folder / ANALYSIS).unlink()
        for path in (self._metrics, self._eval, self._per_class):
            _replace(path, [row for row in read_rows(path) if int(row["step"]) <= keep_until])

    def add_step(self, step: Step) -> None:
        """Appends one row to `metrics.csv`, in full precision.

        Raises:
            TrainingError: the file has other columns.
        """
        row = {"step": step.step, "epoch": step.epoch, "split": "train", "lr": step.rate}
        seconds = {"seconds": step.seconds, "data_seconds": step.data_seconds}
        _append(self._metrics, [row | step.numbers | seconds])

    def add_metrics(self, step: int, epoch: int, stages: Mapping[str, CocoMetrics]) -> None:
        """Appends one row per stage and task to `eval.csv`, and replaces `per_class.csv`.

        Args:
            step: the number of finished optimiser steps.
            epoch: the epoch, from 0.
            stages: the metrics of each stage that was scored, see `Validation`; `final` always is.

        Raises:
            TrainingError: the file has other columns.
        """
        rows: list[dict[str, Any]] = []
        for stage, metrics in stages.items():
            for task in TASKS:
                row = {"step": step, "epoch": epoch, "stage": stage, "task": task}
                values = metrics.values[task]
                rows.append(
                    row | {name: values[name] if values[name] >= 0 else NONE for name in METRICS}
                )
        _append(self._eval, rows)
        final = stages["final"]
        classes = [
            {"step": step, "task": task, "class": name, "AP": ap}
            for task in TASKS
            for name, ap in final.per_class[task].items()
        ]
        _replace(self._per_class, classes)

    def add_analysis(self, step: int, errors: ErrorAnalysis) -> None:
        """Replaces `analysis.json`.

        Args:
            step: the number of finished optimiser steps.
            errors: what is wrong with the model.
        """
        content = dataclasses.asdict(Analysis(step=step, errors=errors))
        write_whole(self._folder / ANALYSIS, (json.dumps(content) + "\n").encode())


def read_analysis(folder: Path) -> Analysis | None:
    """Returns the analysis of the run in `folder`; None if it has none, or one of another version."""
    try:
        return from_dict(Analysis, json.loads((folder / ANALYSIS).read_bytes()))
    except (FileNotFoundError, ValueError):
        return None


def read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the complete rows of a CSV file with a header; no rows if the file does not exist."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1].decode()
    lines = csv.reader(io.StringIO(whole, newline=""))
    header = next(lines, [])
    rows = takewhile(lambda row: len(row) == len(header), lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def read_steps(folder: Path) -> list[Step]:
    """Returns the steps of the run in `folder` in their order, without a truncated one."""
    return [
        Step(
            step=int(row["step"]),
            epoch=int(row["epoch"]),
            rate=float(row["lr"]),
            losses={
                k.removeprefix("loss_"): float(v) for k, v in row.items() if k.startswith("loss_")
            },
            seconds=float(row.get("seconds", 0)),
            data_seconds=float(row.get("data_seconds", 0)),
        )
        for row in read_rows(folder / "metrics.csv")
    ]


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Returns the evaluations of the run in `folder` in their order, without a truncated one."""
    evaluations = []
    rows = read_rows(folder / "eval.csv")
    for (step, epoch), group in groupby(rows, lambda row: (int(row["step"]), int(row["epoch"]))):
        values: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        for row in group:
            values[row["stage"]][row["task"]] = {
                name: -1.0 if row[name] == NONE else float(row[name]) for name in METRICS
            }
        whole = {stage: tasks for stage, tasks in values.items() if len(tasks) == len(TASKS)}
        if "final" in whole:
            evaluations.append(Evaluation(step=step, epoch=epoch, values=whole))
    return evaluations


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows in one write, so that a kill can hardly truncate them."""
    new = not path.exists()
    if not new:
        with path.open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
        if header != list(rows[0]):  # Another version wrote it: the reader would drop these rows.
            raise TrainingError(
                f"{path}: has the columns {', '.join(header)}, expected {', '.join(rows[0])}; "
                f"move it away, then go on with --resume"
            )
    with path.open("ab") as file:
        file.write(_csv(rows, header=new))


def _replace(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the table by `rows`; removes the file if `rows` is empty."""
    if rows:
        write_whole(path, _csv(rows, header=True))
    else:
        path.unlink(missing_ok=True)


def _csv(rows: list[dict[str, Any]], *, header: bool) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def show_seeds(folders: list[Path], file: Path) -> Iterator[str]:
    """Writes the last evaluation of each run to a JSON file, and yields lines for the user.

    The deviation is the sample standard deviation, with the denominator n - 1.

    Args:
        folders: the folders of finished runs, one per seed.
        file: the file for `{metric: {"values": [...], "mean": m, "deviation": s}}`, in AP points.
    """
    lasts = {folder.name: read_evaluations(folder)[-1:] for folder in folders}
    runs = {name: last[0] for name, last in lasts.items() if last}
    if not runs:
        yield "no evaluation to compare: train.evaluate_every is 0"
        return
    report = {}
    for name, values in _points(list(runs.values())).items():
        mean, deviation = statistics.fmean(values), None
        text = f"{name}: {mean:.2f}"
        if len(values) > 1:
            deviation = statistics.stdev(values)
            text += f" ± {deviation:.2f}"
        report[name] = {"values": values, "mean": mean, "deviation": deviation}
        yield text
    content = {"runs": list(runs), "points": report}
    write_whole(file, (json.dumps(content, indent=2) + "\n").encode())
    yield f"over {len(runs)} seeds, mean ± deviation; wrote {file}"


def _points(runs: list[Evaluation]) -> dict[str, list[float]]:
    """Returns the AP points of all runs by metric, for the metrics that every run has."""
    points: dict[str, list[float]] = {}
    for task in TASKS:
        for metric in SHOWN:
            points[f"{TASK_NAMES[task]} {metric}"] = [r.points("final", task, metric) for r in runs]
    if all("plain" in run.values for run in runs):
        points["box AP, weighted minus plain average of the cells"] = [
            run.points("final", "bbox") - run.points("plain", "bbox") for run in runs
        ]
    return {name: values for name, values in points.items() if all(map(math.isfinite, values))}
