"""`report.html`: a run on one page that needs nothing beside it."""

from __future__ import annotations

import json
import math
import re
import statistics
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from comask.data.source import Category
from comask.evaluate import METRICS, TASK_NAMES, TASKS, ap_text
from comask.files import write_whole
from comask.page import facts, page, picture, table
from comask.training.figures import second_stage
from comask.training.record import Evaluation, read_evaluations, read_rows

# By model.collaboration: what there is to say where boxes are no weighted average
_OTHER_REFINEMENT = {
    "uniform": "All cells count alike (model.collaboration=uniform).",
    "fc_reg": "Boxes are regressed by the classification branch (model.collaboration=fc_reg); the plain "
    "average is that of cells which were not trained.",
}


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
        parts += [_second_stage(folder, evaluations[-1], config), _coco(evaluations[-1])]
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


def _second_stage(folder: Path, last: Evaluation, config: dict[str, Any]) -> str:
    """What the second stage adds to the first, and the weights of the cells to their plain average."""
    if "first" not in last.values:
        return ""
    rows, sentences = [], []
    for task, what in TASK_NAMES.items():
        points = second_stage(last, task)
        rows += [(f"{what} AP, {name}", ap_text(value)) for name, value in points.items()]
    boxes = second_stage(last, "bbox")
    gain = boxes["weighted average"] - boxes["plain average"]
    if config["model"]["collaboration"] != "weighted":
        sentences.append(_OTHER_REFINEMENT[config["model"]["collaboration"]])
    elif math.isfinite(gain):
        sentences.append(
            f"Weighting the cells by the mask changes box AP by {gain:+.2f} points against the plain "
            f"average of the same cells: that is what the collaboration does at test time. The rest of "
            f"the difference to the proposals is any second stage's."
        )
    else:
        sentences.append("It cannot be told: the validation data holds no objects.")
    if not any(last.points("final", task) > 0 for task in TASKS) and math.isfinite(gain):
        sentences = ["Nothing was found yet."]
    note = "Small differences may be chance: comask-train --seeds tells how far AP scatters."
    return (
        f"<h2>What the second stage adds</h2><p>{escape(' '.join(sentences))}</p>"
        f"{table((f'step {last.step:,}', 'points'), rows)}"
        f'<p class="note">{note}</p>{_image(folder / "second_stage.png")}'
    )


def _coco(last: Evaluation) -> str:
    rows = [
        (TASK_NAMES[task], *(_points(last, task, metric=name) for name in METRICS))
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
    values = {(row["class"], row["task"]): ap_text(100 * float(row["AP"]), ".1f") for row in rows}
    tasks = ("segm", "bbox")
    listed = table(
        ("class", *(f"{TASK_NAMES[task]} AP" for task in tasks)),
        ((c.name, *(values.get((c.name, task), "n/a") for task in tasks)) for c in categories),
    )
    return (
        f'<h2>AP of each class at step {int(rows[0]["step"]):,}</h2><div class="parts">{listed}</div>'
        '<p class="note">n/a: no objects of this class in the validation data.</p>'
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
    return ap_text(evaluation.points("final", task, metric), ".1f")
