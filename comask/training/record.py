"""What a run writes about itself: `metrics.csv`, `eval.csv` and their curves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from comask.evaluate import METRICS, TASKS, CocoMetrics


class RunRecord:
    """Appends to the run's tables.

    Args:
        folder: of the run.
        keep_until: rows of later steps are dropped: a resumed run writes them again.
    """

    def __init__(self, folder: Path, *, keep_until: int) -> None:
        self._metrics = folder / "metrics.csv"
        self._eval = folder / "eval.csv"
        for path in (self._metrics, self._eval):
            rows = read_rows(path)
            path.unlink(missing_ok=True)
            for row in rows:
                if int(row["step"]) <= keep_until:
                    _append(path, row)

    def add_losses(self, step: int, epoch: int, rate: float, losses: dict[str, float]) -> None:
        """One row of `metrics.csv`: the losses of optimiser step `step` (from 1), full precision."""
        row = {"step": step, "epoch": epoch, "split": "train", "lr": rate}
        row |= {"loss": sum(losses.values())}
        row |= {f"loss_{name}": value for name, value in losses.items()}
        _append(self._metrics, row)

    def add_metrics(self, step: int, epoch: int, metrics: CocoMetrics) -> None:
        """One row a task of `eval.csv`: COCO's twelve numbers after `step` steps."""
        for task in TASKS:
            row: dict[str, Any] = {"step": step, "epoch": epoch, "task": task}
            _append(self._eval, row | {name: metrics.values[task][name] for name in METRICS})


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def draw_curves(folder: Path) -> list[Path]:
    """`losses.png` and `ap.png` from the tables of a run; a table without rows gives no picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    losses, evaluations = read_rows(folder / "metrics.csv"), read_rows(folder / "eval.csv")
    if losses:
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        steps = [int(row["step"]) for row in losses]
        window = max(1, len(steps) // 50)
        for name in [key for key in losses[0] if key.startswith("loss")]:
            values = _smoothed([float(row[name]) for row in losses], window)
            axes.plot(steps, values, label=name, linewidth=2.5 if name == "loss" else 1.2)
        axes.set(
            xlabel="step",
            ylabel=f"loss, mean of {window} steps",
            title="training losses",
            yscale="log",
        )
        axes.grid(alpha=0.3)
        rate_axes = axes.twinx()
        rate_axes.plot(steps, [float(row["lr"]) for row in losses], color="gray", linestyle=":")
        rate_axes.set_ylabel("learning rate (dotted)")
        axes.legend(fontsize=8, ncols=2)
        written.append(folder / "losses.png")
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    if evaluations:
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for task, style in zip(TASKS, ("--", "-"), strict=True):
            rows = [row for row in evaluations if row["task"] == task]
            for name in ("AP", "AP50", "AP75"):
                axes.plot(
                    [int(row["step"]) for row in rows],
                    [100 * float(row[name]) for row in rows],
                    style,
                    marker="o",
                    label=f"{task} {name}",
                )
        axes.set(xlabel="step", ylabel="AP points", title="validation", ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        written.append(folder / "ap.png")
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    return written


def _smoothed(values: list[float], window: int) -> list[float]:
    """The mean of each value and up to window - 1 before it."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]
