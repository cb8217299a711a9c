"""`report.html`: a run on one page that needs nothing beside it."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from comask.data.source import Category
from comask.evaluate import METRICS, TASKS
from comask.page import facts, page, picture, table
from comask.training.curves import COLLABORATION, points_text
from comask.training.record import STAGES, Evaluation, read_evaluations, read_rows
from comask.whole_file import write_whole

# By model.collaboration: what turns the unrefined boxes into the refined ones
_REFINEMENT = {
    "weighted": "the weighted average",
    "uniform": "the plain average (model.collaboration=uniform)",
    "fc_reg": "the classification branch's regression (model.collaboration=fc_reg)",
}
_PLURAL = {"bbox": "boxes", "segm": "masks"}
_NO_CHANGE = 0.05  # AP points; less is 0.0 where results are published


def write_report(
    folder: Path, *, config: dict[str, Any], categories: tuple[Category, ...], title: str
) -> Path:
    """Writes `report.html` from what lies in the folder of a run; what is absent is left out.

    Args:
        folder: of the run, with any of `metrics.csv`, `eval.csv`, `per_class.csv`, the pictures of
            `draw_curves` and `pictures/step-000320.png`, of which the newest is shown.
        config: `dataclasses.asdict` of the run's `Config`.
        categories: the classes in label order.
        title: of the page.

    Returns:
        The report, replaced as a whole: safe to call after each evaluation.
    """
    evaluations = read_evaluations(folder)
    parts = [_summary(read_rows(folder / "metrics.csv"), evaluations, config)]
    if evaluations:
        parts += [_collaboration(folder, evaluations, config), _coco(evaluations[-1])]
    else:
        parts.append("<p>No evaluation yet.</p>")
    curves = [_image(folder / name) for name in ("ap.png", "losses.png")]
    if any(curves):
        parts.append("<h2>Curves</h2>" + "".join(curves))
    parts += [_pictures(folder), _per_class(folder, categories), _configuration(config)]
    path = folder / "report.html"
    write_whole(path, page(title, parts).encode())
    return path


def _summary(
    losses: list[dict[str, str]], evaluations: list[Evaluation], config: dict[str, Any]
) -> str:
    found: list[tuple[str, str]] = []
    if losses:
        step = int(losses[-1]["step"])
        images = step * config["train"]["batch_size"]
        found.append(("last step", f"{step:,} (epoch {int(losses[-1]['epoch']) + 1})"))
        found.append(("images seen, steps times train.batch_size", f"{images:,}"))
    if evaluations:
        best = max(evaluations, key=lambda e: e.values["final"]["segm"]["AP"])
        for name, shown in (("last", evaluations[-1]), ("best", best)):
            text = f"mask {_points(shown, 'segm')}, box {_points(shown, 'bbox')}"
            found.append((f"AP of the {name} evaluation, step {shown.step:,}", text))
    seconds = [float(row["seconds"]) for row in losses]
    if sum(seconds):
        # The median, since the first step and those after an evaluation are far slower.
        found.append(("seconds a step (median)", f"{statistics.median(seconds):.3g}"))
        waited = sum(float(row["data_seconds"]) for row in losses)
        found.append(("time waiting for data", f"{100 * waited / sum(seconds):.1f} %"))
    if not found:
        return "<p>No step yet.</p>"
    return facts(found)


def _collaboration(folder: Path, evaluations: list[Evaluation], config: dict[str, Any]) -> str:
    last = evaluations[-1]
    causes = {
        "bbox": _REFINEMENT[config["model"]["collaboration"]],
        "segm": "the second pass, on the refined boxes,",
    }
    rows, sentences, counts, gains = [], [], [], []
    for task in TASKS:
        what, before, after = COLLABORATION[task]
        gain = last.points("final", task) - last.points("first", task)
        # Two digits, or a small difference would seem not to be that of its neighbours.
        old, new = (points_text(last.points(stage, task), ".2f") for stage in ("first", "final"))
        rows.append((f"{what} AP, {before} → {after}", old, new, points_text(gain, "+.2f")))
        if not math.isfinite(gain):
            continue
        gains.append(gain)
        cause = causes[task]
        sentences.append(
            cause[0].upper() + cause[1:] + f" {_change(f'{what} AP', old, new, gain)}."
        )
        every = [e.points("final", task) - e.points("first", task) for e in evaluations]
        better = sum(g >= _NO_CHANGE for g in every)
        counts.append(
            f"{after} {_PLURAL[task]} were better in {better} of {len(every)} evaluations"
        )
    text = " ".join([_verdict(gains), *sentences])
    points = [last.points(stage, task) for stage in STAGES for task in TASKS]
    if gains and not any(value >= _NO_CHANGE for value in points):
        text = "Nothing was found yet."
    elif len(evaluations) > 1 and counts:
        text += f" Over the run, {', '.join(counts)}."
    gained = table((f"step {last.step:,}", "before", "after", "difference"), rows)
    note = "Small differences may be chance; runs with another train.seed tell."
    return (
        f"<h2>Is the collaboration earning its keep?</h2><p>{escape(text)}</p>{gained}"
        f'<p class="note">{note}</p>{_image(folder / "collaboration.png")}'
    )


def _change(what: str, old: str, new: str, gain: float) -> str:
    if abs(gain) < _NO_CHANGE:
        return f"hardly changed {what}, from {old} to {new}"
    direction = "raised" if gain > 0 else "LOWERED"
    return f"{direction} {what} by {abs(gain):.2f} points, from {old} to {new}"


def _verdict(gains: Sequence[float]) -> str:
    """A word on differences in AP points."""
    up = [gain >= _NO_CHANGE for gain in gains]
    down = [gain <= -_NO_CHANGE for gain in gains]
    if not gains:
        return "It cannot be told: the validation data holds no objects."
    if all(up):
        return "Yes."
    if any(up):
        return "In part."
    return "No: it does harm." if any(down) else "No: it makes no difference."


def _coco(last: Evaluation) -> str:
    rows = [
        (COLLABORATION[task][0], *(_points(last, task, metric=name) for name in METRICS))
        for task in TASKS
    ]
    return f"<h2>COCO metrics at step {last.step:,}</h2>" + table(("points", *METRICS), rows)


def _pictures(folder: Path) -> str:
    found = []
    for path in (folder / "pictures").glob("step-*.png"):
        if match := re.fullmatch(r"step-(\d+)\.png", path.name):
            found.append((int(match[1]), path.name))
    if not found:
        return ""
    (step, newest), *older = sorted(found, reverse=True)
    links = ", ".join(
        f'<a href="pictures/{escape(quote(name))}">step {number:,}</a>' for number, name in older
    )
    return f"<h2>Validation images at step {step:,}</h2>{_image(folder / 'pictures' / newest)}" + (
        f'<p class="note">Earlier: {links}</p>' if links else ""
    )


def _per_class(folder: Path, categories: tuple[Category, ...]) -> str:
    rows = read_rows(folder / "per_class.csv")
    if not rows:
        return ""
    values = {(row["class"], row["task"]): points_text(100 * float(row["AP"])) for row in rows}
    tasks = ("segm", "bbox")
    listed = table(
        ("class", *(f"{COLLABORATION[task][0]} AP" for task in tasks)),
        ((c.name, *(values.get((c.name, task), "-") for task in tasks)) for c in categories),
    )
    return (
        f'<h2>AP of each class at step {int(rows[0]["step"]):,}</h2><div class="parts">{listed}</div>'
        '<p class="note">-: no objects of this class in the validation data.</p>'
    )


def _configuration(config: dict[str, Any]) -> str:
    parts = []
    for part, values in config.items():
        rows = (
            (name, value if isinstance(value, str) else json.dumps(value))
            for name, value in values.items()
        )
        parts.append(
            f"<section><h3>{escape(part)}</h3>{table(('setting', 'value'), rows)}</section>"
        )
    return f'<h2>Configuration</h2><div class="parts">{"".join(parts)}</div>'


def _image(path: Path) -> str:
    """The picture inside the page; nothing where there is none."""
    if not path.exists():
        return ""
    return picture(path.read_bytes(), path.name)


def _points(evaluation: Evaluation, task: str, metric: str = "AP") -> str:
    return points_text(evaluation.points("final", task, metric))
