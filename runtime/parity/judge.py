"""The verdict on one contestant: AP points off the reference, and tensors beyond their tolerance."""

from __future__ import annotations

from typing import Any

from comask.bundle import Manifest
from comask.evaluate import METRICS, TASKS, CocoMetrics

# AP points that a contestant may lie off the reference, by precision or, of another pipeline, `results`.
# Of what rounds, AP alone is judged: some of the twelve numbers rest on few objects or on one IoU
# threshold, and scatter more than it. It may also gain; anything else that gains is another network.
AP_TOLERANCES = {"fp32": 0.1, "fp16": 0.1, "int8": 0.3, "results": 0.1}
JUDGED = {"fp32": METRICS, "fp16": ("AP",), "int8": ("AP",), "results": ("AP",)}
MAY_GAIN = ("fp16", "int8")
LEAST_AGREEMENT = 0.8  # of a pipeline of the user's own, whose tensors nobody sees


def ap_tolerance(manifest: Manifest, kind: str) -> float:
    """AP points that a contestant may lie off; of int8 the budget that its export was accepted with."""
    budget: float = manifest.verification.get(kind, {}).get("budget", AP_TOLERANCES[kind])
    return budget


def points(metrics: CocoMetrics) -> dict[str, Any]:
    """One contestant's AP in points, -1 kept; `coco_ap` where other than COCO's 100 detections count."""
    values: dict[str, Any] = {
        task: {key: 100 * value if value >= 0 else -1.0 for key, value in numbers.items()}
        for task, numbers in metrics.values.items()
    }
    return {
        **values,
        "detections": metrics.detections,
        "per_class": metrics.per_class,
        "max_detections": metrics.max_detections,
        "coco_ap": {
            task: 100 * ap if ap >= 0 else -1.0 for task, ap in (metrics.coco_ap or {}).items()
        },
    }


def points_text(value: float) -> str:
    """AP points with two digits; `n/a` for -1, where there are no such objects or no such results."""
    return f"{value:.2f}" if value >= 0 else "n/a"


def change_text(value: float, delta: float) -> str:
    """How far a contestant's `value` in points lies off; `n/a` where it is."""
    return f"{delta:+.3f}" if value >= 0 else "n/a"


def compare_ap(
    metrics: CocoMetrics, base: CocoMetrics, kind: str, tolerance: float
) -> dict[str, Any]:
    """Differences in AP points; a -1 (no such objects) is compared only with -1.

    Args:
        metrics: of the contestant.
        base: of the reference.
        kind: a key of `JUDGED`.
        tolerance: how far they may lie off, in points.
    """
    deltas = {
        task: {key: 100 * (value - base.values[task][key]) for key, value in values.items()}
        for task, values in metrics.values.items()
    }
    worst_classes = {
        task: sorted(
            (100 * (ap - base.per_class[task][label]), label)
            for label, ap in metrics.per_class[task].items()
        )[:3]
        for task in TASKS
    }
    may_gain = kind in MAY_GAIN
    off = {
        (task, metric): max(0.0, -delta) if may_gain else abs(delta)
        for task in TASKS
        for metric, delta in deltas[task].items()
        if metric in JUDGED[kind]
    }
    task, metric = max(off, key=lambda place: off[place])
    largest = off[task, metric]
    failures = []
    if not largest <= tolerance:
        what = {"bbox": "boxes", "segm": "masks"}[task]
        failures.append(
            f"{metric} of {what} is {deltas[task][metric]:+.3f} points off, "
            f"at most {tolerance:g} may be{' lost' if may_gain else ''}"
        )
    return {
        "deltas": deltas,
        "largest": largest,
        "judged": list(JUDGED[kind]),
        "may_gain": may_gain,
        "tolerance": tolerance,
        "worst_classes": worst_classes,
        "failures": failures,
    }
