"""`report.html`: a run on one page that needs nothing beside it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from comask.config import Config
from comask.data.source import Category
from comask.evaluate import METRICS, TASK_NAMES, TASKS, ap_text
from comask.files import write_whole
from comask.page import render
from comask.training.figures import second_stage
from comask.training.record import Evaluation, Step, read_evaluations, read_rows, read_steps

TEMPLATE = Path(__file__).with_name("report.html.jinja")
FIGURES = ("second_stage.png", "ap.png", "losses.png")

# By model.collaboration: what there is to say where boxes are no weighted average
_OTHER_REFINEMENT = {
    "uniform": "All cells count alike (model.collaboration=uniform).",
    "fc_reg": "Boxes are regressed by the classification branch (model.collaboration=fc_reg); the plain "
    "average is that of cells which were not trained.",
}


def write_report(
    folder: Path, *, config: Config, categories: tuple[Category, ...], title: str
) -> Path:
    """Writes `report.html` from what lies in the folder of a run; what is absent is left out.

    Args:
        folder: of the run, with any of `metrics.csv`, `eval.csv`, `per_class.csv`, the pictures of
            `draw_curves` and `pictures/step-000320.png`, of which the newest is shown.
        config: of the run.
        categories: the classes in label order.
        title: of the page.

    Returns:
        The report, replaced as a whole: safe to call after each evaluation.
    """
    evaluations = read_evaluations(folder)
    last = evaluations[-1] if evaluations else None
    classes = read_rows(folder / "per_class.csv")
    pictures = {
        int(match[1]): path
        for path in (folder / "pictures").glob("step-*.png")
        if (match := re.fullmatch(r"step-(\d+)\.png", path.name))
    }
    page = render(
        TEMPLATE,
        title=title,
        facts_of_run=list(_facts(read_steps(folder), evaluations, config)),
        last=last,
        verdict=_verdict(last, config.model.collaboration) if last else "",
        second_stage=second_stage,
        figures={p.name: p.read_bytes() for name in FIGURES if (p := folder / name).exists()},
        pictures=sorted(pictures.items(), reverse=True),
        class_step=int(classes[0]["step"]) if classes else None,
        class_ap=defaultdict(
            lambda: -1.0,
            {(row["class"], row["task"]): 100 * float(row["AP"]) for row in classes},
        ),
        categories=categories,
        config={
            part: {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
            for part, settings in dataclasses.asdict(config).items()
        },
        tasks=TASKS,
        task_names=TASK_NAMES,
        metrics=METRICS,
    )
    path = folder / "report.html"
    write_whole(path, page)
    return path


def _facts(
    losses: list[Step], evaluations: list[Evaluation], config: Config
) -> Iterator[tuple[str, str]]:
    """Names and values that sum the run up."""
    if losses:
        step = losses[-1].step
        images = step * config.train.batch_size
        yield "last step", f"{step:,} (epoch {losses[-1].epoch + 1})"
        yield "images seen, steps times train.batch_size", f"{images:,}"
    if evaluations:
        best = max(evaluations, key=lambda e: e.values["final"]["segm"]["AP"])
        for name, shown in (("last", evaluations[-1]), ("best", best)):
            mask, box = (ap_text(shown.points("final", task), ".1f") for task in ("segm", "bbox"))
            yield f"AP of the {name} evaluation, step {shown.step:,}", f"mask {mask}, box {box}"
    seconds = [row.seconds for row in losses]
    if sum(seconds):
        # The median, since the first step and those after an evaluation are far slower.
        yield "seconds a step (median)", f"{statistics.median(seconds):.3g}"
        waited = sum(row.data_seconds for row in losses)
        yield "time waiting for data", f"{100 * waited / sum(seconds):.1f} %"


def _verdict(last: Evaluation, collaboration: str) -> str:
    """What the weights of the cells add to their plain average; empty where that was not evaluated."""
    if "first" not in last.values:
        return ""
    boxes = second_stage(last, "bbox")
    gain = boxes["weighted average"] - boxes["plain average"]
    if math.isfinite(gain) and not any(last.points("final", task) > 0 for task in TASKS):
        return "Nothing was found yet."
    if collaboration != "weighted":
        return _OTHER_REFINEMENT[collaboration]
    if not math.isfinite(gain):
        return "It cannot be told: the validation data holds no objects."
    return (
        f"Weighting the cells by the mask changes box AP by {gain:+.2f} points against the plain "
        f"average of the same cells: that is what the collaboration does at test time. The rest of "
        f"the difference to the proposals is any second stage's."
    )
