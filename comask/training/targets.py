"""Assigns training targets to boxes: matching, sampling, jitter and mask targets.

Boxes are f32 `xyxy` in pixels of the resized image.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from comask.data.training_set import MaskCrops, Target

BACKGROUND = -1
IGNORE = -2
CROWD_SHARE = 0.5  # a candidate is in a crowd if at least this share of its own area is


def match(iou: Tensor, positive: float, negative: float, *, keep_best: bool) -> Tensor:
    """Assigns an object to each candidate box, like torchvision's Matcher.

    Args:
        iou: [G, N], the IoU of G objects with N candidates.
        positive: a candidate with at least this IoU is assigned its best object.
        negative: a candidate below this IoU is background; between the two, it is ignored.
        keep_best: whether to assign every object also the candidates with its largest IoU (the RPN's
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


def without_crowds(matches: Tensor, candidates: Tensor, crowds: Tensor) -> Tensor:
    """Returns the matches with background candidates in crowds changed to ignored ones.

    A crowd region contains objects without outlines, so it is not background. A candidate is in a crowd
    if at least half of its own area is, as in mmdetection's `ignore_iof_thr`.

    Args:
        matches: [N] i64, the result of `match`.
        candidates: [N, 4].
        crowds: [C, 4].
    """
    if not len(crowds):
        return matches
    low = torch.maximum(candidates[:, None, :2], crowds[None, :, :2])
    high = torch.minimum(candidates[:, None, 2:], crowds[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    area = (candidates[:, 2:] - candidates[:, :2]).prod(dim=1)
    inside = (shared >= CROWD_SHARE * area[:, None]).any(dim=1) & (area > 0)
    return torch.where(inside & (matches == BACKGROUND), IGNORE, matches)


def sample(
    matches: Tensor,
    count: int,
    positive_fraction: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses at most `count` random candidates, of which at most `positive_fraction` are positive.

    Returns:
        The indices of positives, and the indices of negatives.
    """
    positives, negatives = torch.where(matches >= 0)[0], torch.where(matches == BACKGROUND)[0]
    num_positive = min(len(positives), int(count * positive_fraction))
    num_negative = min(len(negatives), count - num_positive)
    return (
        choose(positives, num_positive, generator),
        choose(negatives, num_negative, generator),
    )


def choose(items: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns `count` random `items`, or all of them if they are fewer."""
    order = torch.randperm(len(items), device=items.device, generator=generator)
    return items[order[:count]]


def jitter(
    boxes: Tensor,
    amount: float,
    height: int,
    width: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns boxes [N, 4] with centre and size changed by up to ±`amount` of their size, then clipped.

    They imitate the refined boxes that the head receives in its second pass (Grid R-CNN, section 3.2).
    """
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    unit = torch.rand(boxes.shape, device=boxes.device, generator=generator)
    noise = (unit * 2 - 1) * amount  # for centre x, y and for width, height
    shift, growth = noise[:, :2].repeat(1, 2), noise[:, 2:]
    moved = boxes + shift * size + torch.cat((-growth, growth), dim=1) * size / 2
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(moved.clamp(min=0), limits)


def mask_targets(target: Target, rois: Tensor, objects: Tensor, size: int) -> Tensor:
    """Returns the part of its object's bitmap in each RoI.

    Args:
        target: the target of one image.
        rois: [R, 4], within the image.
        objects: [R] i64, indices into `target.masks`.
        size: the height and width of the result.

    Returns:
        [R, size, size] f32, 0 or 1.
    """
    cuts = rois.new_zeros((len(rois), size, size))
    if len(rois) == 0:
        return cuts
    places, corners = target.masks.places, rois * target.mask_scale
    wanted = objects.cpu()
    for group in _of_like_size(places, wanted.unique()):
        maps, origins = _padded_crops(target.masks, group)
        place_of = torch.full((len(places),), -1)
        place_of[group] = torch.arange(len(group))
        chosen = torch.where(place_of[wanted] >= 0)[0]
        place = place_of[wanted[chosen]].to(rois.device)
        chosen = chosen.to(rois.device)
        local = corners[chosen] - origins.to(rois)[place].repeat(1, 2)
        indexed = torch.cat((place[:, None].to(rois), local), dim=1)
        aligned = torchvision.ops.roi_align(
            maps.to(rois), indexed, (size, size), 1.0, -1, aligned=True
        )
        cuts[chosen] = (aligned[:, 0] >= 0.5).to(rois)
    return cuts


def mask_iou(masks: Tensor, cuts: Tensor, target: Target, rois: Tensor, objects: Tensor) -> Tensor:
    """Returns the IoU of masks in RoIs with their objects, [R] in 0..1.

    What lies of an object outside its RoI counts as missed, as in Mask Scoring R-CNN.

    Args:
        masks: [R, M, M], 0 or 1.
        cuts: [R, M, M], the result of `mask_targets` for the same RoIs.
        target: the target of one image.
        rois: [R, 4].
        objects: [R] i64, indices into `target.masks`.
    """
    corners = rois * target.mask_scale
    pixel = (corners[:, 2:] - corners[:, :2]).prod(dim=1) / masks.shape[1] ** 2
    whole = target.masks.areas()[objects] / pixel.clamp(min=1e-6)
    inside, both = cuts.sum(dim=(1, 2)), (masks * cuts).sum(dim=(1, 2))
    union = masks.sum(dim=(1, 2)) + torch.maximum(whole, inside) - both
    return both / union.clamp(min=1.0)


def _of_like_size(places: Tensor, objects: Tensor) -> list[Tensor]:
    """Groups `objects` by crops whose heights and widths each differ by less than a factor of two.

    Padded to one size, a group's crops take at most four times the memory of the objects.
    """
    octaves = places[objects, 2:].clamp(min=1).log2().floor()
    _, group_of = octaves.unique(dim=0, return_inverse=True)
    return [objects[group_of == group] for group in range(int(group_of.max()) + 1)]


def _padded_crops(masks: MaskCrops, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Returns crops as maps of one size, with the border that RoIAlign would read in the image.

    A crop is surrounded by zeros. At the image's end, RoIAlign repeats the last row and column, so the
    maps repeat them, too.

    Args:
        masks: the masks of one image.
        objects: [N] i64, the indices of the masks.

    Returns:
        [N, 1, h, w] u8, and [N, 2] i64, (x, y) of each map's top left pixel in the image.
    """
    sizes = masks.places[:, 2:].prod(dim=1)
    x, y, crop_h, crop_w = (side[:, None] for side in masks.places[objects].unbind(dim=1))
    left, top = (x - 1).clamp(min=0), (y - 1).clamp(min=0)
    columns = left + torch.arange(int((x + crop_w + 1 - left).max()))  # [N, w] in the image
    rows = top + torch.arange(int((y + crop_h + 1 - top).max()))
    height, width = masks.image_size
    columns = torch.where(columns == width, width - 1, columns) - x  # in the crop
    rows = torch.where(rows == height, height - 1, rows) - y
    inside = ((rows >= 0) & (rows < crop_h))[:, :, None]
    inside = inside & ((columns >= 0) & (columns < crop_w))[:, None]
    starts = (sizes.cumsum(dim=0) - sizes)[objects]
    flat = starts[:, None, None] + rows[:, :, None] * crop_w[:, :, None] + columns[:, None]
    device = masks.pixels.device
    inside = inside.to(device)
    if not len(masks.pixels):
        return inside[:, None].to(torch.uint8), torch.cat((left, top), dim=1)
    maps = masks.pixels[torch.where(inside, flat.to(device), 0)] * inside
    return maps[:, None], torch.cat((left, top), dim=1)
