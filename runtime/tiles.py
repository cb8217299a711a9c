"""Joins what the overlapping tiles of an image found.

Tiles and the whole image see different parts of an object. Where two regions overlap, both see the same
pixels, so that masks of one object agree there, however little one of them sees elsewhere; boxes of an
object that a seam cuts need not overlap by much, and boxes of neighbours may. So Cellpose stitches the
planes of a volume (`stitch3D`, Stringer et al. 2021, https://doi.org/10.1038/s41592-020-01018-x). Taking
detections by falling score and giving the best score to all is SAHI's greedy merging (Akyon et al. 2022,
https://arxiv.org/abs/2202.06934), which compares boxes. The shares are measured: benchmarks/tiles.py
prints AP with others, and by other rules.

Regions are (x1, y1, x2, y2) in whole pixels of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from comask.masks import run_length_mask
from comask.segmentation import RunLengthMask
from comask.structures import Detections

Region: TypeAlias = tuple[int, int, int, int]
Crop: TypeAlias = tuple[int, int, NDArray[np.bool_]]  # see `Detections.crop`

SAME, MOST, FULL = 0.5, 0.75, 0.4  # least shares for `joined`
# A border cuts a detection whose box comes this close to it, in pixels of the network's canvas: one cell
# of its finest feature map.
CUT_WITHIN = 4.0


def joined(whole: Detections, tiles: Mapping[Region, Detections], scale: float) -> Detections:
    """Joins what the overlapping tiles of an image found, and what the whole image did.

    Detections of a class are taken by falling score. Each is compared, in the pixels that its region
    shares with those of a group's members, with all of their masks. It belongs to the group with which it
    agrees best:

    - with an IoU of at least `SAME` it is the same object, unless the group has one of its own region,
      which tells its own apart;
    - if the group covers as large a share of it, it is a part of the object if a border of its tile cuts
      it, and a duplicate, which is left out, if none does.

    A detection that belongs to no group begins one. If it belongs to several, these groups become one,
    provided that borders cut all of their detections and no region has detections in both. So a middle
    part links the ends of an object, and nothing links two objects that were seen whole.

    Each group then becomes one detection with its highest score. Its box and mask are those of the first
    of these whose mask is a large share of the union of all: a tile's detection that no border cuts, by
    falling score, with at least `FULL` of the union; those of all tiles together with `MOST`; the whole
    image's, whose mask is coarse, with `FULL`; all together. Detections together have the hull of their
    boxes and the union of their masks, pixel for pixel.

    Args:
        whole: what the image as one view found, in its pixels.
        tiles: what each tile found, in pixels of the tile.
        scale: the canvas's pixels per pixel of a tile.

    Returns:
        all objects by falling score.
    """
    size = whole.image_size
    image = (0, 0, size[1], size[0])
    margin = CUT_WITHIN / scale
    instances = _instances(whole, image, image, margin)
    for region, found in tiles.items():
        instances += _instances(found, region, image, margin)
    instances.sort(key=lambda instance: -instance.score)  # stable
    groups = _groups(instances)
    boxes, masks = np.zeros((len(groups), 4)), []
    for place, group in enumerate(groups):
        boxes[place], mask = _one(group, image)
        masks.append(run_length_mask(*mask, size))
    scores = np.array([group[0].score for group in groups])
    labels = np.array([group[0].label for group in groups], np.int64)
    return whole.with_instances(boxes, scores, labels, masks)


@dataclass(frozen=True, slots=True, eq=False)
class _Instance:
    """A detection of one region, in pixels of the image.

    Attributes:
        region: the region in which it was found.
        cut: whether a border of the region that is not the image's cuts it.
        box: [4] f64, its corners.
        score: its score.
        label: its class.
        bounds: the box of whole pixels that its mask fills.
        mask: its mask within `bounds`.
    """

    region: Region
    cut: bool
    box: NDArray[np.float64]
    score: float
    label: int
    bounds: Region
    mask: RunLengthMask


def _instances(found: Detections, region: Region, image: Region, margin: float) -> list[_Instance]:
    """Returns what one region found; a border cuts those whose boxes come within `margin` of it."""
    inner = np.not_equal(region, image)
    boxes = found.boxes_xyxy + np.array(region[:2] * 2, np.float64)
    cut = ((abs(boxes - np.array(region)) <= margin) & inner).any(axis=1)
    instances = []
    for i, (score, label) in enumerate(
        zip(found.scores.tolist(), found.labels.tolist(), strict=True)
    ):
        x, y, crop = _trimmed(*found.crop(i))
        height, width = crop.shape
        x, y = x + region[0], y + region[1]
        bounds, mask = (x, y, x + width, y + height), run_length_mask(0, 0, crop, (height, width))
        instances.append(_Instance(region, bool(cut[i]), boxes[i], score, label, bounds, mask))
    return instances


def _trimmed(x: int, y: int, crop: NDArray[np.bool_]) -> Crop:
    """Returns a crop without empty rows and columns around its mask."""
    rows, columns = np.flatnonzero(crop.any(axis=1)), np.flatnonzero(crop.any(axis=0))
    if not len(rows):
        return x, y, crop[:0, :0]
    top, left = int(rows[0]), int(columns[0])
    return x + left, y + top, crop[top : rows[-1] + 1, left : columns[-1] + 1]


def _groups(instances: Sequence[_Instance]) -> list[list[_Instance]]:
    """Groups instances, given by falling score, by object, without duplicates; see `joined`."""
    bounds = np.array([instance.bounds for instance in instances]).reshape(-1, 4)
    labels = np.array([instance.label for instance in instances])
    group_of = np.full(len(instances), -1)
    groups: list[list[_Instance]] = []
    for i, instance in enumerate(instances):
        low = np.maximum(bounds[:i, :2], bounds[i, :2])
        high = np.minimum(bounds[:i, 2:], bounds[i, 2:])
        near = (low < high).all(axis=1) & (labels[:i] == labels[i]) & (group_of[:i] >= 0)
        pixels = instance.mask.bitmap()
        fits = [
            (*fit, place)
            for place in np.unique(group_of[:i][near]).tolist()
            if (fit := _fit(instance, pixels, groups[place])) is not None
        ]
        if not fits:
            group_of[i] = len(groups)
            groups.append([instance])
            continue
        (same, _, home), *others = sorted(fits, reverse=True)
        if not same and not instance.cut:
            continue  # a duplicate
        for _, _, other in others:
            if _are_parts(groups[home], groups[other]):
                groups[home] += groups[other]
                groups[other] = []
                group_of[group_of == other] = home
        groups[home] = sorted([*groups[home], instance], key=lambda member: -member.score)
        group_of[i] = home
    return [group for group in groups if group]


def _fit(
    instance: _Instance, pixels: NDArray[np.bool_], group: Sequence[_Instance]
) -> tuple[bool, float] | None:
    """Returns whether an instance is a group's object rather than a part or duplicate, and their IoU.

    None if it is neither; `pixels` are those of its mask.
    """
    both, own, theirs = _shared_pixels(instance, pixels, group)
    if not both:
        return None
    iou = both / (own + theirs - both)
    same = iou >= SAME and all(member.region != instance.region for member in group)
    return (same, iou) if same or both >= SAME * own else None


def _are_parts(group: Sequence[_Instance], other: Sequence[_Instance]) -> bool:
    """Returns whether borders cut all of two groups, and no region tells them apart."""
    members = [*group, *other]
    apart = {member.region for member in group} & {member.region for member in other}
    return not apart and all(member.cut for member in members)


def _shared_pixels(
    instance: _Instance, pixels: NDArray[np.bool_], group: Sequence[_Instance]
) -> tuple[int, int, int]:
    """Counts pixels where an instance's region overlaps those of a group's members.

    Returns:
        the numbers of pixels of both, of the instance, and of the members, summed over the members.
    """
    both, own, theirs = 0, 0, 0
    for member in group:
        shared = _intersection(instance.region, member.region)
        if shared is None or member.region == instance.region:
            continue
        others = member.mask.bitmap()
        own += _count(_part(pixels, instance.bounds, shared))
        theirs += _count(_part(others, member.bounds, shared))
        overlap = _intersection(_intersection(instance.bounds, member.bounds), shared)
        both += _count(
            _part(pixels, instance.bounds, overlap) & _part(others, member.bounds, overlap)
        )
    return both, own, theirs


def _count(pixels: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(pixels))


def _part(pixels: NDArray[np.bool_], bounds: Region, window: Region | None) -> NDArray[np.bool_]:
    """Returns a view of the pixels of a mask, given within `bounds`, that lie in a window."""
    inside = _intersection(bounds, window)
    if inside is None:
        return pixels[:0, :0]
    x, y, _, _ = bounds
    return pixels[inside[1] - y : inside[3] - y, inside[0] - x : inside[2] - x]


def _one(group: Sequence[_Instance], image: Region) -> tuple[NDArray[np.float64], Crop]:
    """Returns the box and the mask of one object, whose best detection comes first; see `joined`."""
    everything = _union(group)
    if len(group) == 1:
        return group[0].box, everything
    area = int(everything[2].sum())
    of_tiles = [instance for instance in group if instance.region != image]
    choices = [([instance], FULL) for instance in of_tiles if not instance.cut]
    choices += [(of_tiles, MOST)]
    choices += [([instance], FULL) for instance in group if instance.region == image]
    for chosen, share in choices:
        if not chosen:
            continue
        mask = _union(chosen)
        if mask[2].sum() >= share * area:
            return _box_hull(chosen), mask
    return _box_hull(group), everything


def _union(group: Sequence[_Instance]) -> Crop:
    window = _hull([instance.bounds for instance in group if instance.mask.area])
    union = np.zeros((window[3] - window[1], window[2] - window[0]), np.bool_)
    for instance in group:
        x1, y1, x2, y2 = np.subtract(instance.bounds, window[:2] * 2).tolist()
        union[y1:y2, x1:x2] |= instance.mask.bitmap()
    return window[0], window[1], union


def _box_hull(group: Sequence[_Instance]) -> NDArray[np.float64]:
    boxes = np.array([instance.box for instance in group])
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


def _hull(regions: Sequence[Region]) -> Region:
    """Returns the smallest region around some; an empty one of none."""
    if not regions:
        return 0, 0, 0, 0
    corners = np.array(regions)
    x1, y1 = corners[:, :2].min(axis=0).tolist()
    x2, y2 = corners[:, 2:].max(axis=0).tolist()
    return x1, y1, x2, y2


def _intersection(a: Region | None, b: Region | None) -> Region | None:
    """Returns what two regions share, or None."""
    if a is None or b is None:
        return None
    x1, y1, x2, y2 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
