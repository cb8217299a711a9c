"""Averages what mirrored and resized views of one region found: test-time augmentation.

Boxes are averaged by weighted boxes fusion (Solovyev et al. 2021, https://arxiv.org/abs/1910.13302).
Masks, which it does not cover, are averaged pixel by pixel, as in `GeneralizedRCNNWithTTA` of detectron2
(detectron2/modeling/test_time_augmentation.py). benchmarks/tiles.py measures what it brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from comask.masks import run_length_mask
from comask.runtime.compare import box_ious
from comask.structures import Detections

Flips: TypeAlias = tuple[bool, bool]  # whether left and right, and top and bottom are exchanged

SAME_BOX = 0.55  # IoU above which boxes of several views are fused: weighted boxes fusion's default


def averaged(views: Sequence[tuple[Flips, Detections]]) -> Detections:
    """Averages what several views of one region found.

    Detections of a class are taken by falling score. Each joins the group whose box it overlaps most, if
    the IoU is above `SAME_BOX` and the group has none of the same view, which tells its own apart; else
    it begins one. A group's box and mask are the averages of its members', weighted by their scores. Its
    score is the sum of theirs divided by the number of views, so that a view without it counts as 0.

    Args:
        views: of each, how it is mirrored, and the detections in the mirrored region.

    Returns:
        the groups by falling score.
    """
    first = views[0][1]
    size = first.image_size
    boxes = np.concatenate([_mirrored_boxes(found, flips) for flips, found in views])
    scores = np.concatenate([found.scores for _, found in views])
    weights = np.maximum(scores, np.finfo(np.float32).tiny)  # whose sum is not 0
    labels = np.concatenate([found.labels for _, found in views])
    view_of = np.repeat(np.arange(len(views)), [len(found) for _, found in views])
    index_in = np.concatenate([np.arange(len(found)) for _, found in views])
    groups: list[list[int]] = []
    fused = np.zeros((len(scores), 4))
    members = np.zeros((len(scores), len(views)), np.bool_)  # which views a group has one of
    group_labels = np.zeros(len(scores), np.int64)
    for i in np.argsort(-scores, kind="stable").tolist():
        count = len(groups)
        open_to = (group_labels[:count] == labels[i]) & ~members[:count, view_of[i]]
        ious = np.where(open_to, box_ious(fused[:count], boxes[i]), 0)
        if count and ious.max() > SAME_BOX:
            place = int(ious.argmax())
        else:
            place = count
            groups.append([])
            group_labels[place] = labels[i]
        groups[place].append(i)
        members[place, view_of[i]] = True
        fused[place] = np.average(boxes[groups[place]], axis=0, weights=weights[groups[place]])
    totals = np.array([scores[group].sum(dtype=np.float64) for group in groups])
    masks = []
    for group in groups:
        crops = [_mirrored_probs(views[view_of[i]], int(index_in[i])) for i in group]
        crop = _average(crops, weights[group], first.mask_threshold)
        masks.append(run_length_mask(*crop, size))
    count = len(groups)
    return first.with_instances(fused[:count], totals / len(views), group_labels[:count], masks)


def _mirrored_boxes(found: Detections, flips: Flips) -> NDArray[np.float64]:
    """Returns the boxes [N, 4] in the region before it was mirrored."""
    x1, y1, x2, y2 = found.boxes_xyxy.astype(np.float64).T
    (height, width), (across, down) = found.image_size, flips
    if across:
        x1, x2 = width - x2, width - x1
    if down:
        y1, y2 = height - y2, height - y1
    return np.stack([x1, y1, x2, y2], axis=1)


def _mirrored_probs(
    view: tuple[Flips, Detections], index: int
) -> tuple[int, int, NDArray[np.float32]]:
    """Returns one mask's `crop_probs` in the region before it was mirrored."""
    (across, down), found = view
    x, y, probs = found.crop_probs(index)
    height, width = found.image_size
    if across:
        x, probs = width - x - probs.shape[1], probs[:, ::-1]
    if down:
        y, probs = height - y - probs.shape[0], probs[::-1]
    return x, y, probs


def _average(
    crops: Sequence[tuple[int, int, NDArray[np.float32]]],
    weights: NDArray[np.float32],
    threshold: float,
) -> tuple[int, int, NDArray[np.bool_]]:
    """Returns where the weighted average of probabilities, 0 outside each crop, reaches the threshold."""
    if len(crops) == 1:
        ((x, y, probs),) = crops
        return x, y, probs >= np.float32(threshold)
    places = [(x, y, x + p.shape[1], y + p.shape[0]) for x, y, p in crops if p.size]
    corners = np.array(places or [(0, 0, 0, 0)])
    (x1, y1), (x2, y2) = corners[:, :2].min(axis=0).tolist(), corners[:, 2:].max(axis=0).tolist()
    total = np.zeros((y2 - y1, x2 - x1), np.float32)
    for (x, y, probs), weight in zip(crops, weights / weights.sum(), strict=True):
        if probs.size:
            height, width = probs.shape
            total[y - y1 : y - y1 + height, x - x1 : x - x1 + width] += weight * probs
    return x1, y1, total >= np.float32(threshold)
