"""The verdict on one contestant: how far its AP, tensors and detections lie off the reference's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Manifest
from comask.config import ModelConfig
from comask.evaluate import METRICS, TASKS, CocoMetrics
from comask.preprocess import Prepared
from comask.runtime.backends.base import Stages
from comask.runtime.compare import TOLERANCES, Comparison, compare_stages

# AP points that a contestant may lie off the reference, by precision or, of another pipeline, `results`.
# Of what rounds, AP alone is judged: some of the twelve numbers rest on few objects or on one IoU
# threshold, and scatter more than it. It may also gain; anything else that gains is another network.
AP_TOLERANCES = {"fp32": 0.1, "fp16": 0.1, "int8": 0.3, "results": 0.1}
JUDGED = {"fp32": METRICS, "fp16": ("AP",), "int8": ("AP",), "results": ("AP",)}
MAY_GAIN = ("fp16", "int8")
LEAST_AGREEMENT = 0.8  # of a pipeline of the user's own, whose tensors nobody sees
WORST = 3  # images on which a contestant agrees least

IMAGES = 4  # of a data set, that are compared stage by stage
LISTED = 6  # failures of that: a broken graph has one for every box

SAME_OBJECT = 0.5  # boxes of one class that overlap less are of different objects

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ApComparison:
    """AP of a contestant minus that of the reference, in points.

    Attributes:
        deltas: `deltas[task][metric]`.
        largest: the largest difference that is judged.
        judged: the metrics that are judged.
        may_gain: whether only a loss counts.
        tolerance: how large `largest` may be.
        worst_classes: of each task the three classes that lose most, each with its difference.
        failures: one sentence each.
    """

    deltas: dict[str, dict[str, float]]
    largest: float
    judged: tuple[str, ...]
    may_gain: bool
    tolerance: float
    worst_classes: dict[str, list[tuple[float, str]]]
    failures: list[str]


@dataclass(frozen=True, kw_only=True)
class StageComparison:
    """What `compare_stages` found on some images; `Comparison` explains what is not named here.

    Attributes:
        images: how many were compared.
        judged: whether failures count, see `compare_backends`.
        beyond: how many failures there are.
        failures: the first `LISTED` of them.
    """

    images: int
    judged: bool
    relative: dict[str, float]
    proposals: int
    contested_proposals: int
    detections: int
    contested_detections: int
    box: float
    score: float
    mask: float
    degenerate: bool
    beyond: int
    failures: list[str]


@dataclass(frozen=True, kw_only=True)
class ImageAgreement:
    """How far detections in one image agree.

    Attributes:
        place: of the image among those that were scored.
        file: its name in the data.
        agreement: see `agreement`.
    """

    place: int
    file: str
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Verdict(ApComparison):
    """All that was found on one contestant.

    Attributes:
        stages: the comparison stage by stage; None of results from elsewhere, and of what is not finite.
        agreement: over all images, see `agreement`.
        worst_images: those of least agreement, the worst first.
        mistakes: of failing results from elsewhere, their agreement with the reference under each usual
            mistake.
        passed: whether nothing failed.
    """

    stages: StageComparison | None = None
    agreement: float
    worst_images: list[ImageAgreement]
    mistakes: dict[str, float] | None = None
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", not self.failures)


def ap_tolerance(manifest: Manifest, kind: str) -> float:
    """AP points that a contestant may lie off; of int8 the budget that its export was accepted with."""
    budget: float = manifest.verification.get(kind, {}).get("budget", AP_TOLERANCES[kind])
    return budget


def compare_ap(
    metrics: CocoMetrics, base: CocoMetrics, kind: str, tolerance: float
) -> ApComparison:
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
    return ApComparison(
        deltas=deltas,
        largest=largest,
        judged=JUDGED[kind],
        may_gain=may_gain,
        tolerance=tolerance,
        worst_classes=worst_classes,
        failures=failures,
    )


def compare_backends(
    reference: Stages,
    other: Stages,
    images: Sequence[Prepared],
    model: ModelConfig,
    precision: str,
) -> StageComparison:
    """Compares two backends stage by stage, one image at a time.

    int8 is not judged by it: on a trained network a cell's confidence that rounds across its threshold
    moves a mask's pixel by 0.7. Boxes then find their partners by the tolerance of fp16, and
    `failures` is empty.

    Args:
        reference: usually PyTorch.
        other: the backend in question.
        images: to compare on.
        model: its thresholds.
        precision: whose tolerance counts.
    """
    tolerance = TOLERANCES.get(precision)
    found = Comparison()
    for image in images:
        compare_stages(
            reference,
            other,
            [image],
            model,
            tolerance=tolerance or TOLERANCES["fp16"],
            into=found,
        )
    failures = found.failures if tolerance else []
    return StageComparison(
        images=len(images),
        judged=tolerance is not None,
        beyond=len(failures),
        **vars(found) | {"failures": failures[:LISTED]},
    )


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


def _ious(a: Entries, b: Entries) -> NDArray[np.float64]:
    """IoU of boxes, [len(a), len(b)]."""
    from pycocotools import mask as coco_mask

    boxes = [np.array([entry["bbox"] for entry in rows], dtype=np.float64) for rows in (a, b)]
    ious: NDArray[np.float64] = np.array(coco_mask.iou(*boxes, [0] * len(b)))
    return ious


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
