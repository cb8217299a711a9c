"""A run's curves as pictures: `losses.png`, `ap.png` and `collaboration.png`."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comask.evaluate import TASKS
from comask.training.record import Evaluation, read_evaluations, read_rows
from comask.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GAIN, _LOSS, _BEFORE = "#1f77b4", "#d62728", "#888888"
# Of each task its name, and what the first and the final stage's results are called
COLLABORATION = {"segm": ("mask", "coarse", "final"), "bbox": ("box", "unrefined", "refined")}


def draw_curves(folder: Path) -> list[Path]:
    """Draws what the tables of a run hold; a table without rows gives no picture.

    Args:
        folder: of the run, with `metrics.csv` and `eval.csv`.

    Returns:
        Those of `losses.png`, `ap.png` and `collaboration.png` in `folder` that were written.
    """
    figures: dict[str, Figure] = {}
    losses, evaluations = read_rows(folder / "metrics.csv"), read_evaluations(folder)
    if losses:
        figures["losses.png"] = _losses(losses)
    if evaluations:
        figures["ap.png"] = _precision(evaluations)
        figures["collaboration.png"] = _collaboration(evaluations)
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120)
        write_whole(folder / name, content.getvalue())
    return [folder / name for name in figures]


def points_text(value: float, form: str = ".1f") -> str:
    """AP points in a number format; "-" for NaN, where there are no such objects."""
    return f"{value:{form}}" if math.isfinite(value) else "-"


def _losses(rows: list[dict[str, str]]) -> Figure:
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    steps = [int(row["step"]) for row in rows]
    window = max(1, len(steps) // 50)
    for name in [key for key in rows[0] if key.startswith("loss")]:
        values = _smoothed(np.array([float(row[name]) for row in rows]), window)
        axes.plot(steps, values, label=name, linewidth=2.5 if name == "loss" else 1.2)
    axes.set(
        xlabel="step",
        ylabel=f"loss, mean of {window} steps" if window > 1 else "loss",
        title="training losses",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    rate_axes = axes.twinx()
    rate_axes.plot(steps, [float(row["lr"]) for row in rows], color="gray", linestyle=":")
    rate_axes.set_ylabel("learning rate (dotted)")
    axes.legend(fontsize=8, ncols=2)
    return figure


def _precision(evaluations: list[Evaluation]) -> Figure:
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    for task, style in zip(TASKS, ("--", "-"), strict=True):
        for color, name in enumerate(("AP", "AP50", "AP75")):
            values = [e.points("final", task, name) for e in evaluations]
            label = f"{COLLABORATION[task][0]} {name}"
            axes.plot(
                _steps(evaluations), values, style, color=f"C{color}", marker="o", label=label
            )
    axes.set(xlabel="step", ylabel="AP points", title="validation")
    _limit(axes)
    axes.legend(fontsize=8, ncols=2)
    return figure


def _collaboration(evaluations: list[Evaluation]) -> Figure:
    """AP of both stages above, their difference below: a few points drown in a whole run's rise."""
    figure = _figure(10, 5.5)
    panels = figure.subplots(
        2, 2, sharex=True, squeeze=False, gridspec_kw={"height_ratios": (3, 2)}
    )
    steps = _steps(evaluations)
    for (task, (what, before, after)), (above, below) in zip(
        COLLABORATION.items(), panels.T, strict=True
    ):
        first = [e.points("first", task) for e in evaluations]
        final = [e.points("final", task) for e in evaluations]
        gains = [b - a for a, b in zip(first, final, strict=True)]
        above.plot(steps, first, "--", color=_BEFORE, marker="o", label=before)
        above.plot(steps, final, "-", color=_GAIN, marker="o", label=after)
        above.set(ylabel="AP points")
        old, new = points_text(first[-1], ".2f"), points_text(final[-1], ".2f")
        above.set_title(f"{what} AP: {before} {old} → {after} {new}", fontsize=11)
        _limit(above)
        above.legend(fontsize=8)
        colors = [_LOSS if gain < 0 else _GAIN for gain in gains]
        below.vlines(steps, 0, gains, colors=colors, linewidth=3)
        below.scatter(steps, gains, c=colors, s=20)
        below.axhline(0, color="black", linewidth=1)
        below.set(xlabel="step", ylabel=f"{after} minus {before}")
        below.grid(alpha=0.3)
        # Not less than a point each way, lest rounding look like a difference.
        reach = 1.15 * max([1.0, *(abs(gain) for gain in gains if math.isfinite(gain))])
        below.set_ylim(-reach, reach)
    last = evaluations[-1]
    summary = ", ".join(
        f"{what} AP {points_text(last.points('final', task) - last.points('first', task), '+.2f')}"
        for task, (what, _, _) in COLLABORATION.items()
    )
    figure.suptitle(
        f"What the collaboration adds: {summary} points at step {last.step}", fontweight="bold"
    )
    return figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, without pyplot and the backend it keeps for all."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _steps(evaluations: list[Evaluation]) -> list[int]:
    return [evaluation.step for evaluation in evaluations]


def _limit(axes: Axes) -> None:
    """Makes the axes of AP points over steps hold what is drawn, in y 2 points at least."""
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 100.0)
    margin = max(1.0, 0.08 * (high - low))
    axes.set_ylim(max(0.0, low - margin), min(100.0, high + margin))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # there are no half steps
    axes.grid(alpha=0.3)


def _smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of each of `values` ([N]) and up to window - 1 before it."""
    sums = np.concatenate(([0.0], values.cumsum()))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))
