"""Writes `report.html`: one self-contained page about a run."""

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
from comask.error_analysis import ErrorAnalysis
from comask.error_pictures import Picture, caption
from comask.error_section import ErrorSection, error_section
from comask.evaluate import METRICS, TASK_NAMES, TASKS, ap_text
from comask.files import write_whole
from comask.page import render
from comask.training.figures import second_stage
from comask.training.record import (
    Evaluation,
    Step,
    read_analysis,
    read_evaluations,
    read_rows,
    read_steps,
)
from comask.training.training_images import NAME as TRAINING_IMAGES

TEMPLATE = Path(__file__).with_name("report.html.jinja")
FIGURES = ("second_stage.png", "ap.png", "losses.png", TRAINING_IMAGES)

# The verdicts for values of model.collaboration whose boxes are not weighted averages.
_OTHER_REFINEMENT = {
    "uniform": "All cells have equal weight (model.collaboration=uniform).",
    "fc_reg": "The classification branch regresses the boxes (model.collaboration=fc_reg); the plain "
    "average is taken over cells that were not trained.",
}


def write_report(
    folder: Path, *, config: Config, categories: tuple[Category, ...], title: str
) -> Path:
    """Writes `report.html` from the files in a run's folder; missing ones are left out.

    It replaces the page atomically, so it may be called after each evaluation.

    Args:
        folder: the run's folder, with any of `metrics.csv`, `eval.csv`, `per_class.csv`,
            `analysis.json` with `pictures/worst-1.jpg` and so on, the figures of `draw_curves`, and
            `pictures/step-000320.png`, of which the newest is shown.
        config: the run's configuration.
        categories: the classes in label order.
        title: the page's title.

    Returns:
        The page's path.
    """
    evaluations = read_evaluations(folder)
    last = evaluations[-1] if evaluations else None
    classes = read_rows(folder / "per_class.csv")
    pictures = {
        int(match[1]): path
        for path in (folder / "pictures").glob("step-*.png")
        if (match := re.fullmatch(r"step-(\d+)\.png", path.name))
    }
    analysis = read_analysis(folder)
    page = render(
        TEMPLATE,
        title=title,
        facts_of_run=list(_facts(read_steps(folder), evaluations, config)),
        last=last,
        verdict=_verdict(last, config.model.collaboration) if last else "",
        second_stage=second_stage,
        figures={p.name: p.read_bytes() for name in FIGURES if (p := folder / name).exists()},
        pictures=sorted(pictures.items(), reverse=True),
        analysis_step=analysis.step if analysis else None,
        errors=_error_section(analysis.errors, folder / "pictures") if analysis else None,
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


def _error_section(errors: ErrorAnalysis, folder: Path) -> ErrorSection:
    """Returns what the page shows of an analysis, with the pictures in `folder`."""
    paths = {
        folder / f"worst-{number}.jpg": image
        for number, image in enumerate(errors.tasks["segm"].worst, start=1)
    }
    pictures = [
        Picture(caption(image), path.read_bytes()) for path, image in paths.items() if path.exists()
    ]
    return error_section(errors, pictures)


def _facts(
    losses: list[Step], evaluations: list[Evaluation], config: Config
) -> Iterator[tuple[str, str]]:
    """Yields names and values that summarise the run."""
    if losses:
        step = losses[-1].step
        images = step * config.train.batch_size
        yield "last step", f"{step:,} (epoch {losses[-1].epoch + 1})"
        yield "images seen (steps times train.batch_size)", f"{images:,}"
    if evaluations:
        best = max(evaluations, key=lambda e: e.values["final"]["segm"]["AP"])
        for name, shown in (("last", evaluations[-1]), ("best", best)):
            mask, box = (ap_text(shown.points("final", task), ".1f") for task in ("segm", "bbox"))
            yield f"AP of the {name} evaluation, step {shown.step:,}", f"mask {mask}, box {box}"
    seconds = [row.seconds for row in losses]
    if sum(seconds):
        # The median, since the first step and steps after an evaluation are far slower.
        yield "seconds per step (median)", f"{statistics.median(seconds):.3g}"
        waited = sum(row.data_seconds for row in losses)
        yield "time waiting for data", f"{100 * waited / sum(seconds):.1f} %"


def _verdict(last: Evaluation, collaboration: str) -> str:
    """Returns a sentence about the gain by the cells' weights; empty if it was not evaluated."""
    if "first" not in last.values:
        return ""
    boxes = second_stage(last, "bbox")
    gain = boxes["weighted average"] - boxes["plain average"]
    if math.isfinite(gain) and not any(last.points("final", task) > 0 for task in TASKS):
        return "The model detects nothing yet."
    if collaboration != "weighted":
        return _OTHER_REFINEMENT[collaboration]
    if not math.isfinite(gain):
        return "The gain cannot be measured, since the validation data holds no objects."
    return (
        f"Weighting the cells by the mask changes box AP by {gain:+.2f} points compared with the plain "
        f"average of the same cells: this is the effect of the collaboration at test time, in a network "
        f"that was trained with it. The rest of "
        f"the difference to the proposals comes from having a second stage at all."
    )
