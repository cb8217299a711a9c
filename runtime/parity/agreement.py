"""How much two backends' detections of one image agree: a Dice coefficient over detections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAME_OBJECT = 0.5  # boxes of one class that overlap less are of different objects

Entries = Sequence[Mapping[str, Any]]


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
