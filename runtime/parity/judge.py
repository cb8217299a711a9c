"""The verdict on one contestant: AP points off the reference, tensors beyond tolerance, agreement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Manifest
from comask.evaluate import METRICS, TASKS, CocoMetrics

# AP points that a contestant may lie off the reference, by precision or, of another pipeline, `results`.
# Of what rounds, AP alone is judged: some of the twelve numbers rest on few objects or on one IoU
# threshold, and scatter more than it. It may also gain; anything else that gains is another network.
AP_TOLERANCES = {"fp32": 0.1, "fp16": 0.1, "int8": 0.3, "results": 0.1}
JUDGED = {"fp32": METRICS, "fp16": ("AP",), "int8": ("AP",), "results": ("AP",)}
MAY_GAIN = ("fp16", "int8")
LEAST_AGREEMENT = 0.8  # of a pipeline of the user's own, whose tensors nobody sees

SAME_OBJECT = 0.5  # boxes of one class that overlap less are of different objects

Entries = Sequence[Mapping[str, Any]]


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


def pairs(a: Entries, b: Entries) -> list[tuple[int, int, float]]:
    """Detections of one image that two backends share.

    Each of `a`, by falling score, takes the one of `b` that is left of its class and overlaps it most.

    Args:
        a: COCO results of one backend, with segmentations as RLE.
        b: of the other.

    Returns:
        places in `a` and `b`, and the lesser of the IoUs of boxes and of masks.
    """
    from pycocotools import mask as coco_mask

    if not a or not b:
        return []
    boxes = _ious(a, b)
    categories = [np.array([entry["category_id"] for entry in rows]) for rows in (a, b)]
    boxes[categories[0][:, None] != categories[1]] = 0.0
    found = []
    for i in np.argsort([-entry["score"] for entry in a], kind="stable").tolist():
        j = int(boxes[i].argmax())
        if boxes[i, j] < SAME_OBJECT:
            continue
        mine, theirs = a[i]["segmentation"], b[j]["segmentation"]
        # two empty masks are equal, and have no IoU
        masks = 1.0 if mine == theirs else float(coco_mask.iou([mine], [theirs], [0])[0, 0])
        found.append((i, j, min(float(boxes[i, j]), masks)))
        boxes[:, j] = 0.0
    return found


def shared(a: Entries, b: Entries) -> tuple[float, float]:
    """Σ 2 min(s_a, s_b) IoU over the detections of one image that are shared, and Σ s_a + Σ s_b over all.

    Detections of low scores count little.
    """
    total = sum(entry["score"] for rows in (a, b) for entry in rows)
    return sum(2 * min(a[i]["score"], b[j]["score"]) * iou for i, j, iou in pairs(a, b)), total


def agreement(images: Iterable[tuple[float, float]]) -> float:
    """1 where both found the same, 0 where they share nothing; images without detections do not count.

    Args:
        images: what `shared` gives of each.
    """
    same, total = np.array([(0.0, 0.0), *images]).sum(axis=0)
    return float(same / total) if total else 1.0


def _ious(a: Entries, b: Entries) -> NDArray[np.float64]:
    """IoU of boxes, [len(a), len(b)]."""
    from pycocotools import mask as coco_mask

    boxes = [np.array([entry["bbox"] for entry in rows], dtype=np.float64) for rows in (a, b)]
    ious: NDArray[np.float64] = np.array(coco_mask.iou(*boxes, [0] * len(b)))
    return ious


def has_failed(report: Mapping[str, Any]) -> bool:
    """Whether something is wrong, whether or not enough was found to judge the rest."""
    failures = report.get("failures")  # unknown to older records
    return bool(failures) or not all(found["passed"] for found in report["comparisons"].values())
