"""The verdict on one contestant: AP points off the reference, and tensors beyond their tolerance."""

from __future__ import annotations

from typing import Any

from comask.evaluate import METRICS, TASKS, CocoMetrics

# AP points that a precision may lie off the reference. Of what rounds, AP alone is judged: some of the
# twelve numbers rest on few objects or on one IoU threshold, and scatter more than it.
AP_TOLERANCES = {"fp32": 0.1, "fp16": 0.1, "int8": 0.3}
JUDGED = {"fp32": METRICS, "fp16": ("AP",), "int8": ("AP",)}
LEAST_AGREEMENT = 0.8  # of a pipeline of the user's own, whose tensors nobody sees


def points(metrics: CocoMetrics) -> dict[str, Any]:
    """One contestant's AP in points, -1 kept."""
    values: dict[str, Any] = {
        task: {key: 100 * value if value >= 0 else -1.0 for key, value in numbers.items()}
        for task, numbers in metrics.values.items()
    }
    return {**values, "detections": metrics.detections, "per_class": metrics.per_class}


def compare_ap(
    metrics: CocoMetrics, base: CocoMetrics, judged: tuple[str, ...], tolerance: float
) -> dict[str, Any]:
    """Differences in AP points; a -1 (no such objects) is compared only with -1.

    Args:
        metrics: of the contestant.
        base: of the reference.
        judged: which of the twelve numbers count.
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
    largest, task, metric = max(
        (abs(deltas[task][metric]), task, metric) for task in TASKS for metric in judged
    )
    failures = []
    if not largest <= tolerance:
        what = {"bbox": "boxes", "segm": "masks"}[task]
        failures.append(
            f"{metric} of {what} is {deltas[task][metric]:+.3f} points off, "
            f"at most {tolerance:g} may be"
        )
    return {
        "deltas": deltas,
        "largest": largest,
        "judged": list(judged),
        "tolerance": tolerance,
        "worst_classes": worst_classes,
        "failures": failures,
    }
