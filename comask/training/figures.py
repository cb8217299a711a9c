"""Draws a run's curves, and ground truth beside predictions."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import detections_from_coco
from comask.data.source import InstanceSource
from comask.draw import draw_tile, font_for
from comask.evaluate import TASK_NAMES, TASKS, ap_text
from comask.files import write_whole
from comask.structures import Detections
from comask.training.record import Evaluation, Step, read_evaluations, read_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from comask.draw import Font

_BEFORE, _PLAIN, _GAIN = "#888888", "#9ecae1", "#1f77b4"

_GAP, _LINE, _FONT_SIZE = 8, 24, 15  # pixels between tiles, height of a text line, font size
_PAPER, _INK = (250, 250, 250), (32, 32, 32)
_ONE_COLUMN = 3  # the most images in one column; more images are in two columns


def draw_curves(folder: Path) -> list[Path]:
    """Draws the tables of a run; a table without rows is skipped.

    Args:
        folder: the run's folder, with `metrics.csv` and `eval.csv`.

    Returns:
        The files in `folder` that were written, of `losses.png`, `ap.png` and `second_stage.png`.
    """
    figures: dict[str, Figure] = {}
    losses, evaluations = read_steps(folder), read_evaluations(folder)
    if losses:
        figures["losses.png"] = _losses(losses)
    if evaluations:
        figures["ap.png"] = _precision(evaluations)
        if "first" in evaluations[-1].values:
            figures["second_stage.png"] = _second_stage(evaluations[-1])
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120)
        write_whole(folder / name, content.getvalue())
    return [folder / name for name in figures]


def _losses(rows: list[Step]) -> Figure:
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    steps = [row.step for row in rows]
    window = max(1, len(steps) // 50)
    numbers = [row.numbers for row in rows]
    for name in numbers[0]:
        values = _smoothed(np.array([of_step[name] for of_step in numbers]), window)
        axes.plot(steps, values, label=name, linewidth=2.5 if name == "loss" else 1.2)
    axes.set(
        xlabel="step",
        ylabel=f"loss, mean of {window} steps" if window > 1 else "loss",
        title="training losses",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    rate_axes = axes.twinx()
    rate_axes.plot(steps, [row.rate for row in rows], color="gray", linestyle=":")
    rate_axes.set_ylabel("learning rate (dotted)")
    axes.legend(fontsize=8, ncols=2)
    return figure


def _precision(evaluations: list[Evaluation]) -> Figure:
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    for task, style in zip(TASKS, ("--", "-"), strict=True):
        for color, name in enumerate(("AP", "AP50", "AP75")):
            values = [e.points("final", task, name) for e in evaluations]
            label = f"{TASK_NAMES[task]} {name}"
            axes.plot(
                _steps(evaluations), values, style, color=f"C{color}", marker="o", label=label
            )
    axes.set(xlabel="step", ylabel="AP points", title="validation")
    _limit(axes)
    axes.legend(fontsize=8, ncols=2)
    return figure


def _second_stage(evaluation: Evaluation) -> Figure:
    """Draws AP before and after the second stage, and AP of the unweighted average of boxes."""
    figure = _figure(8, 4)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    for axes, (task, what) in zip(panels, TASK_NAMES.items(), strict=True):
        bars = second_stage(evaluation, task)
        names, values = list(bars), [bars[name] for name in bars]
        shown = axes.bar(names, np.nan_to_num(values), color=[_BEFORE, _PLAIN, _GAIN][-len(bars) :])
        axes.bar_label(shown, [ap_text(value) for value in values], padding=2)
        axes.set(title=f"{what} AP", ylabel="AP points")
        axes.set_ylim(0, 1.15 * max([1.0, *(v for v in values if math.isfinite(v))]))
        axes.tick_params(axis="x", labelsize=8)
    figure.suptitle(f"What the second stage adds, step {evaluation.step}", fontweight="bold")
    return figure


def second_stage(evaluation: Evaluation, task: str) -> dict[str, float]:
    """Returns the AP points of each of the network's passes, in their order.

    The plain average gives the same cells equal weights; the difference to it shows what the mask's
    weights add. It exists only for boxes, and only in the evaluation at the end of a run.
    """
    if task == "segm":
        stages = {"coarse mask": "first", "final mask": "final"}
    else:
        stages = {"proposal": "first", "plain average": "plain", "weighted average": "final"}
    return {
        name: evaluation.points(stage, task)
        for name, stage in stages.items()
        if stage in evaluation.values
    }


def _figure(width: float, height: float) -> Figure:
    """Returns an empty figure of that size in inches, without pyplot's global backend."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _steps(evaluations: list[Evaluation]) -> list[int]:
    return [evaluation.step for evaluation in evaluations]


def _limit(axes: Axes) -> None:
    """Fits the axes of AP points over steps to the lines, with at least 2 points in y."""
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 100.0)
    margin = max(1.0, 0.08 * (high - low))
    axes.set_ylim(max(0.0, low - margin), min(100.0, high + margin))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # Steps are whole numbers.
    axes.grid(alpha=0.3)


def _smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Returns the mean of each of `values` ([N]) and up to window - 1 values before it."""
    sums = np.concatenate(([0.0], values.cumsum()))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def picture_grid(
    source: InstanceSource,
    indices: list[int],
    detections: list[Detections],
    path: Path,
    *,
    threshold: float = 0.5,
) -> None:
    """Writes a PNG of images, each drawn twice: with its ground truth and with predictions.

    Args:
        source: the source of images and ground truth.
        indices: the indices of the images; if empty, nothing is written.
        detections: predictions in the order of `indices`, in pixels of their images, with labels of
            `source`.
        path: the PNG's path; an existing file is replaced.
        threshold: predictions with lower scores are not drawn.

    Raises:
        ValueError: the number of detections is not the number of images.
        DataError: an annotation cannot be used.
        ImageError: an image cannot be decoded.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows: list[tuple[str, list[NDArray[np.uint8]]]] = []
    names = tuple(category.name for category in source.categories)
    for index, predicted in zip(indices, detections, strict=True):
        image, info = source.image(index), source.info(index)
        shown = dataclasses.replace(predicted[predicted.scores >= threshold], class_names=names)
        truth = draw_tile(image, true_detections(source, index), show_scores=False)
        tiles = [truth, draw_tile(image, shown)]
        rows.append((info.file_name or str(info.id), tiles))
    if not rows:
        return
    columns = 2 if len(rows) > _ONE_COLUMN else 1
    width = max(tiles[0].shape[1] for _, tiles in rows)
    pair = 2 * (width + _GAP)
    lines = [rows[i : i + columns] for i in range(0, len(rows), columns)]
    heights = [max(tiles[0].shape[0] for _, tiles in line) for line in lines]
    size = (columns * (pair + _GAP), _LINE + sum(heights) + len(lines) * (_LINE + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    pen, own_font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT_SIZE)
    for column in range(columns):
        # ASCII only: Pillow's built-in font has neither ≥ nor an ellipsis.
        for side, caption in enumerate(
            ("ground truth", f"predictions of score >= {threshold:.2f}")
        ):
            x = _GAP + column * (pair + _GAP) + side * (width + _GAP)
            pen.text((x, 3), caption, _INK, own_font)
    y = _LINE
    for line, height in zip(lines, heights, strict=True):
        for column, (name, tiles) in enumerate(line):
            x = _GAP + column * (pair + _GAP)
            font = font_for(f"{name}...", _FONT_SIZE) or own_font
            pen.text((x, y + 3), _shortened(name, font, pair - _GAP), _INK, font)
            for side, tile in enumerate(tiles):
                sheet.paste(Image.fromarray(tile), (x + side * (width + _GAP), y + _LINE))
        y += _LINE + height + _GAP
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_whole(path, content.getvalue())


def true_detections(source: InstanceSource, index: int) -> Detections:
    """Returns the annotated objects of image `index` as detections."""
    return detections_from_coco(source.annotations(index), source.info(index), source.categories)


def _shortened(text: str, font: Font, width: int) -> str:
    """Returns `text` as one line, shortened if it is wider than `width` pixels."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
