"""Partners of boxes in another backend's results, and which ones rounding alone may leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comask.runtime.session import Array


@dataclass(frozen=True, slots=True)
class Boxes:
    """One image's boxes, by falling score.

    Attributes:
        boxes: [N, 4] f32 `xyxy` in pixels.
        scores: [N] f32.
        labels: [N] int; boxes of different labels do not compete.
    """

    boxes: Array
    scores: Array
    labels: Array


def match_boxes(a: Array, b: Array, limit: float | Array) -> Array:
    """A partner in `b` for each box of `a`, each used once, edges at most `limit` pixels apart.

    Args:
        a: [N, 4].
        b: [M, 4].
        limit: in pixels, for all boxes of `a` or [N].

    Returns:
        [N] i64, -1 where there is none.
    """
    limits = np.broadcast_to(limit, len(a))
    partner = np.full(len(a), -1, dtype=np.int64)
    free = np.ones(len(b), dtype=bool)
    for i, box in enumerate(a):
        distance = np.where(free, np.abs(b - box).max(axis=1, initial=0.0), np.inf)
        best = int(distance.argmin()) if len(b) else -1
        if best >= 0 and distance[best] <= limits[i]:
            partner[i] = best
            free[best] = False
    return partner


def is_contested(
    rows: Boxes, place: int, rivals: Boxes, nms_iou: float, cuts: Sequence[float], tie: float
) -> bool:
    """Whether rounding alone may have cost a box its partner.

    It did when the score lies at one of `cuts`, or when an overlapping rival of its label and (nearly)
    its score won the NMS in the other backend.

    Args:
        rows: of one backend.
        place: of the box in them.
        rivals: of the other backend.
        nms_iou: of the NMS that both went through.
        cuts: scores below which boxes were dropped.
        tie: two scores this close may change places.
    """
    score = rows.scores[place]
    if any(abs(score - cut) <= tie for cut in cuts):
        return True
    close = (np.abs(rivals.scores - score) <= tie) & (rivals.labels == rows.labels[place])
    # After refinement boxes overlap less or more than when NMS saw them: half its threshold.
    return bool((_iou(rivals.boxes[close], rows.boxes[place]) > nms_iou / 2).any())


def _iou(boxes: Array, box: Array) -> Array:
    """IoU of each of [N, 4] with one [4]."""
    side = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    intersection = side.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    overlap: Array = intersection / np.maximum(areas - intersection, 1e-6)
    return overlap
