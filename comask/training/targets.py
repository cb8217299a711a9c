"""Which box is responsible for what: matching, sampling, jitter and mask targets.

Boxes are f32 `xyxy` in pixels of the resized image.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from comask.data.target import Target

BACKGROUND = -1
IGNORE = -2


def match(iou: Tensor, positive: float, negative: float, *, keep_best: bool) -> Tensor:
    """The ground truth of each candidate box, as torchvision's Matcher assigns it.

    Args:
        iou: [G, N] of G objects with N candidates.
        positive: a candidate of at least this IoU takes its best object.
        negative: one below this is background; between the two it is ignored.
        keep_best: also give every object the candidates that no other candidate beats (the RPN's
            low-quality matches).

    Returns:
        [N] i64: an object's index, BACKGROUND or IGNORE.
    """
    if iou.shape[0] == 0:
        return torch.full((iou.shape[1],), BACKGROUND, dtype=torch.int64, device=iou.device)
    best_iou, best = iou.max(dim=0)
    matches = torch.where(best_iou >= positive, best, IGNORE)
    matches = torch.where(best_iou < negative, BACKGROUND, matches)
    if keep_best:
        best_of_object = iou.max(dim=1, keepdim=True).values
        wanted = ((iou == best_of_object) & (iou > 0)).any(dim=0)
        matches = torch.where(wanted, best, matches)
    return matches


def sample(
    matches: Tensor,
    count: int,
    positive_fraction: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """At most `count` random candidates, at most that fraction of them positive.

    Returns:
        indices of positives and of negatives.
    """
    positives, negatives = torch.where(matches >= 0)[0], torch.where(matches == BACKGROUND)[0]
    num_positive = min(len(positives), int(count * positive_fraction))
    num_negative = min(len(negatives), count - num_positive)
    return (
        choose(positives, num_positive, generator),
        choose(negatives, num_negative, generator),
    )


def choose(items: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` of `items` at random, or all when there are fewer."""
    order = torch.randperm(len(items), device=items.device, generator=generator)
    return items[order[:count]]


def jitter(
    boxes: Tensor,
    amount: float,
    height: int,
    width: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Boxes [N, 4] with centre and size moved by up to ±`amount` of their size, then clipped.

    Imitates the refined boxes that the head meets in its second pass (Grid R-CNN, section 3.2).
    """
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    unit = torch.rand(boxes.shape, device=boxes.device, generator=generator)
    noise = (unit * 2 - 1) * amount  # of centre x, y and of width, height
    shift, growth = noise[:, :2].repeat(1, 2), noise[:, 2:]
    moved = boxes + shift * size + torch.cat((-growth, growth), dim=1) * size / 2
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(moved.clamp(min=0), limits)


def mask_targets(target: Target, rois: Tensor, objects: Tensor, size: int) -> Tensor:
    """Each RoI's cut of its object's bitmap.

    Args:
        target: of one image.
        rois: [R, 4].
        objects: [R] i64, index into `target.masks`.
        size: of the square result.

    Returns:
        [R, size, size] f32, 0 or 1.
    """
    if len(rois) == 0:
        return rois.new_zeros((0, size, size))
    used, place = objects.unique(return_inverse=True)
    indexed = torch.cat((place[:, None].to(rois.dtype), rois * target.mask_scale), dim=1)
    maps = target.masks[used][:, None].to(rois.dtype)
    cut = torchvision.ops.roi_align(maps, indexed, (size, size), 1.0, -1, aligned=True)
    inside: Tensor = cut[:, 0] >= 0.5
    return inside.to(rois.dtype)
