"""The verdict on a contestant: compares its AP, tensors and detections with the reference's."""

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
from comask.runtime.compare import Comparison, compare_stages
from comask.runtime.tolerances import TOLERANCES

# AP points by which a contestant may differ from the reference: by precision, or `results` for another
# pipeline. Only AP is judged if a contestant rounds, because others of the twelve numbers depend on few
# objects or on one IoU threshold and scatter more. Rounding may also raise AP; anything else that raises
# it is another network.
AP_TOLERANCES = {"fp32": 0.1, "fp16": 0.1, "bf16": 0.3, "int8": 0.3, "results": 0.1}
JUDGED = {kind: METRICS if kind == "fp32" else ("AP",) for kind in AP_TOLERANCES}
MAY_GAIN = ("fp16", "bf16", "int8")
LEAST_AGREEMENT = 0.8  # for a user's own pipeline, whose tensors are unknown
WORST = 3  # number of images listed on which a contestant agrees least

IMAGES = 4  # number of images that are compared stage by stage
LISTED = 6  # number of failures listed for them, since a broken graph has one for every box

SAME_OBJECT = 0.5  # boxes of one class with a lower IoU belong to different objects

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ApComparison:
    """A contestant's AP minus the reference's, in points.

    Attributes:
        deltas: `deltas[task][metric]`.
        largest: the largest difference that is judged.
        judged: the metrics that are judged.
        may_gain: whether only a loss counts.
        tolerance: the largest value of `largest` that passes.
        worst_classes: for each task, the three classes that lose most, each with its difference.
        failures: one sentence for each failure.
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
    """The result of `compare_stages` on some images; `Comparison` explains the other attributes.

    Attributes:
        images: the number of images compared.
        judged: whether failures count, see `compare_backends`.
        beyond: the number of failures.
        failures: the first `LISTED` failures.
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
    """The agreement of the detections in one image.

    Attributes:
        place: the image's place among the scored images.
        file: the image's file name in the data.
        agreement: see `agreement`.
    """

    place: int
    file: str
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Verdict(ApComparison):
    """The complete verdict on one contestant.

    Attributes:
        stages: the comparison stage by stage; None for another pipeline's results, and for a backend
            that computes NaN.
        agreement: the agreement over all images, see `agreement`.
        worst_images: the images of least agreement, the worst first.
        mistakes: for failing results of another pipeline, their agreement with the reference under each
            of the usual mistakes; else None.
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
    """Returns the AP points that a contestant may be off; for int8 the budget of its export."""
    budget: float = manifest.verification.get(kind, {}).get("budget", AP_TOLERANCES[kind])
    return budget


def compare_ap(
    metrics: CocoMetrics, base: CocoMetrics, kind: str, tolerance: float
) -> ApComparison:
    """Compares two backends' AP; -1 (no such objects) on one side is always -1 on the other.

    Args:
        metrics: the contestant's metrics.
        base: the reference's metrics.
        kind: a key of `JUDGED`.
        tolerance: the largest difference that passes, in points.
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

    bf16 and int8 are not judged by this: on a trained network, a cell's confidence that rounds across its
    threshold changes a mask's pixel by 0.7. Boxes then find their partners with the tolerance of fp16,
    and `failures` is empty.

    Args:
        reference: the reference backend, usually PyTorch.
        other: the backend to compare.
        images: the images to run.
        model: the model's configuration, for its thresholds.
        precision: the precision whose tolerance counts.
    """
    tolerance = TOLERANCES.get(precision)
    comparison = Comparison()
    for image in images:
        compare_stages(
            reference,
            other,
            [image],
            model,
            tolerance=tolerance or TOLERANCES["fp16"],
            into=comparison,
        )
    failures = comparison.failures if tolerance else []
    return StageComparison(
        images=len(images),
        judged=tolerance is not None,
        beyond=len(failures),
        **vars(comparison) | {"failures": failures[:LISTED]},
    )


def pairs(a: Entries, b: Entries) -> list[tuple[int, int, float]]:
    """Finds the detections of one image that two backends share.

    Each detection of `a`, in descending order of scores, takes the remaining one of `b` that has its
    class and overlaps it most.

    Args:
        a: COCO results of one backend, with segmentations as RLE.
        b: those of the other backend.

    Returns:
        for each pair the places in `a` and `b`, and the smaller of the IoUs of boxes and masks.
    """
    from pycocotools import mask as coco_mask

    if not a or not b:
        return []
    boxes = _ious(a, b)
    categories = [np.array([entry["category_id"] for entry in rows]) for rows in (a, b)]
    boxes[categories[0][:, None] != categories[1]] = 0.0
    matched = []
    for i in np.argsort([-entry["score"] for entry in a], kind="stable").tolist():
        j = int(boxes[i].argmax())
        if boxes[i, j] < SAME_OBJECT:
            continue
        mine, theirs = a[i]["segmentation"], b[j]["segmentation"]
        # two empty masks are equal, but have no IoU
        masks = 1.0 if mine == theirs else float(coco_mask.iou([mine], [theirs], [0])[0, 0])
        matched.append((i, j, min(float(boxes[i, j]), masks)))
        boxes[:, j] = 0.0
    return matched


def _ious(a: Entries, b: Entries) -> NDArray[np.float64]:
    """Returns the IoUs of boxes, [len(a), len(b)]."""
    from pycocotools import mask as coco_mask

    boxes = [np.array([entry["bbox"] for entry in rows], dtype=np.float64) for rows in (a, b)]
    ious: NDArray[np.float64] = np.array(coco_mask.iou(*boxes, [0] * len(b)))
    return ious


def shared(a: Entries, b: Entries) -> tuple[float, float]:
    """Returns the two sums of which one image's agreement is the quotient.

    They are Σ 2 min(s_a, s_b) IoU over the shared detections, and Σ s_a + Σ s_b over all detections, so
    that detections of low scores count little.
    """
    total = sum(entry["score"] for rows in (a, b) for entry in rows)
    return sum(2 * min(a[i]["score"], b[j]["score"]) * iou for i, j, iou in pairs(a, b)), total


def agreement(images: Iterable[tuple[float, float]]) -> float:
    """Returns 1 if both detect the same, 0 if they share nothing; images without detections do not count.

    Args:
        images: the result of `shared` for each image.
    """
    same, total = np.array([(0.0, 0.0), *images]).sum(axis=0)
    return float(same / total) if total else 1.0
