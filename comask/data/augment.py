"""Augments training images: flips, quarter turns, crops, pasted objects, sizes and colours.

Pixels of images and masks are moved, copied or left out. Only pasted objects are resampled, so all other
masks stay exact. Boxes are moved with their masks. `comask.preprocess.prepare` resizes the result, as it
does for every backend. torchvision's transforms need a bitmap of the whole image for each mask, which
takes gigabytes for hundreds of objects; here, masks stay crops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from comask.config import DataConfig, PreprocessConfig

Rng = np.random.Generator
Pixels = NDArray[np.uint8]
Boxes = NDArray[np.float32]
Crop = tuple[int, int, NDArray[np.bool_]]  # the top left pixel's x and y in the image, and [h, w]

# The share of `data.colour` by which the hue may change: larger changes would make classes that differ
# in colour alike.
HUE_SHARE = 0.1
PASTED_SHARE = 0.5  # of another image's objects that are pasted
PASTED_SCALES = 0.5, 1.5  # factors of a pasted object's size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """An image with G objects and C crowds, all in pixels of the image.

    Attributes:
        pixels: [h, w, 3] RGB.
        boxes: [G, 4], (x1, y1, x2, y2).
        crowds: [C, 4], likewise.
        labels: the class of each object, from 0.
        masks: the bitmap of each object, cut to its bounds.
    """

    pixels: Pixels
    boxes: Boxes
    crowds: Boxes
    labels: list[int]
    masks: list[Crop]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the image in pixels."""
        height, width = self.pixels.shape[:2]
        return height, width


def augment(
    sample: Sample,
    config: DataConfig,
    preprocess: PreprocessConfig,
    rng: Rng,
    other: Callable[[], Sample],
) -> tuple[Sample, PreprocessConfig]:
    """Augments an image; settings that are 0 draw nothing from `rng`.

    Args:
        sample: the image, which is not changed.
        config: the settings of the augmentation.
        preprocess: the settings of resize and padding.
        rng: the source of everything random.
        other: returns a random image of the data set, from which objects are pasted.

    Returns:
        The augmented image, and the settings with which it is to be resized.
    """
    if rng.random() < config.flip_probability:
        sample = flipped(sample)
    if config.vertical_flip_probability and rng.random() < config.vertical_flip_probability:
        sample = flipped(sample, vertically=True)
    if config.turn_probability and rng.random() < config.turn_probability:
        sample = turned(sample, int(rng.integers(1, 4)))
    if config.copy_paste_probability and rng.random() < config.copy_paste_probability:
        sample = with_pasted(sample, other(), preprocess, rng)
    if config.short_sides:
        side = int(rng.choice(config.short_sides))
        preprocess = dataclasses.replace(preprocess, short_side=side)
    if config.scale_range != (1.0, 1.0):
        factor = float(rng.uniform(*config.scale_range))
        if factor > 1:
            sample = cropped(sample, factor, rng)
        else:
            preprocess = preprocess.resized(max(1, round(preprocess.short_side * factor)))
    if config.colour:
        pixels = coloured(sample.pixels, config.colour, rng)
        sample = dataclasses.replace(sample, pixels=pixels)
    return sample, preprocess


def flipped(sample: Sample, *, vertically: bool = False) -> Sample:
    """Returns the image with left and right exchanged, or top and bottom."""
    axis = 0 if vertically else 1
    length, near, far = sample.size[axis], 1 - axis, 3 - axis
    boxes, crowds = sample.boxes.copy(), sample.crowds.copy()
    for corners in (boxes, crowds):
        corners[:, [near, far]] = length - corners[:, [far, near]]
    masks = []
    for x, y, crop in sample.masks:
        place = (x, length - y - crop.shape[0]) if vertically else (length - x - crop.shape[1], y)
        masks.append((*place, np.flip(crop, axis)))
    return Sample(
        pixels=np.ascontiguousarray(np.flip(sample.pixels, axis)),
        boxes=boxes,
        crowds=crowds,
        labels=sample.labels,
        masks=masks,
    )


def turned(sample: Sample, quarters: int) -> Sample:
    """Returns the image after this number of quarter turns against the clock."""
    boxes, crowds, masks = sample.boxes, sample.crowds, sample.masks
    for turn in range(quarters):
        width = sample.size[1 - turn % 2]
        boxes, crowds = (
            np.stack([b[:, 1], width - b[:, 2], b[:, 3], width - b[:, 0]], axis=1)
            for b in (boxes, crowds)
        )
        masks = [(y, width - x - crop.shape[1], np.rot90(crop)) for x, y, crop in masks]
    return Sample(
        pixels=np.ascontiguousarray(np.rot90(sample.pixels, quarters)),
        boxes=boxes,
        crowds=crowds,
        labels=sample.labels,
        masks=masks,
    )


def cropped(sample: Sample, factor: float, rng: Rng) -> Sample:
    """Returns a random part of the image whose sides are the image's divided by `factor`.

    Objects without a pixel in it are left out. If the mask or the box of an object is cut, the bounds of
    what remains of the mask become its box.
    """
    height, width = sample.size
    h, w = max(1, round(height / factor)), max(1, round(width / factor))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    boxes, labels, masks = [], [], []
    for box, label, (x, y, crop) in zip(sample.boxes, sample.labels, sample.masks, strict=True):
        rows = slice(max(top - y, 0), max(top + h - y, 0))
        columns = slice(max(left - x, 0), max(left + w - x, 0))
        part = _trimmed((max(x - left, 0), max(y - top, 0), crop[rows, columns]))
        if part is None:
            continue
        moved = box - (left, top, left, top)
        whole = part[2].sum() == crop.sum() and (moved == moved.clip(0, (w, h, w, h))).all()
        boxes.append(moved if whole else _bounds(part))
        labels.append(label)
        masks.append(part)
    crowds = (sample.crowds - (left, top, left, top)).clip(0, (w, h, w, h))
    inside = (crowds[:, 2:] > crowds[:, :2]).all(axis=1)
    return Sample(
        pixels=np.ascontiguousarray(sample.pixels[top : top + h, left : left + w]),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        crowds=crowds[inside].astype(np.float32),
        labels=labels,
        masks=masks,
    )


def with_pasted(sample: Sample, donor: Sample, preprocess: PreprocessConfig, rng: Rng) -> Sample:
    """Returns the image with objects of another one pasted over it (Ghiasi et al., CVPR 2021).

    About half of the donor's objects are pasted at random places. Once resized, an object has the size
    that it has in the resized donor, times a random factor, and at most that of the image. Objects that
    are hidden completely are left out. If an object is hidden in part, the bounds of what remains of its
    mask become its box.

    Args:
        sample: the image.
        donor: the image whose objects are pasted.
        preprocess: the settings of resize and padding.
        rng: the source of everything random.
    """
    from comask.preprocess import resized_shape

    height, width = sample.size
    scales = [resized_shape(s.size, preprocess)[0] / s.size[0] for s in (donor, sample)]
    pixels = sample.pixels.copy()
    covered = np.zeros(sample.size, bool)
    pasted: list[tuple[int, Crop]] = []
    for label, (x, y, crop) in zip(donor.labels, donor.masks, strict=True):
        if rng.random() >= PASTED_SHARE or not crop.size:
            continue
        scale = scales[0] / scales[1] * rng.uniform(*PASTED_SCALES)
        scale = min(scale, height / crop.shape[0], width / crop.shape[1])
        h, w = (max(1, round(side * scale)) for side in crop.shape)
        # Unlike INTER_NEAREST, this takes pixels' centres, as the methods for the colours do.
        nearest = cv2.INTER_NEAREST_EXACT
        mask = cv2.resize(crop.view(np.uint8), (w, h), interpolation=nearest).astype(bool)
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        part = _trimmed((left, top, mask))
        if part is None:
            continue
        source = donor.pixels[y : y + crop.shape[0], x : x + crop.shape[1]]
        shrinks = h * w < source.shape[0] * source.shape[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        place = slice(top, top + h), slice(left, left + w)
        pixels[place][mask] = cv2.resize(source, (w, h), interpolation=method)[mask]
        covered[place] |= mask
        pasted = [
            (of, rest) for of, above in pasted if (rest := _without(above, (left, top, mask)))
        ]
        pasted.append((label, part))
    boxes, labels, masks = [], [], []
    for box, label, mask_before in zip(sample.boxes, sample.labels, sample.masks, strict=True):
        x, y, crop = mask_before
        hidden = covered[y : y + crop.shape[0], x : x + crop.shape[1]]
        rest = _trimmed((x, y, crop & ~hidden)) if (crop & hidden).any() else mask_before
        if rest is not None:
            boxes.append(box if rest is mask_before else _bounds(rest))
            labels.append(label)
            masks.append(rest)
    return Sample(
        pixels=pixels,
        boxes=np.array([*boxes, *(_bounds(m) for _, m in pasted)], np.float32).reshape(-1, 4),
        crowds=sample.crowds,
        labels=[*labels, *(label for label, _ in pasted)],
        masks=[*masks, *(m for _, m in pasted)],
    )


def coloured(pixels: Pixels, strength: float, rng: Rng) -> Pixels:
    """Changes brightness, contrast, saturation and hue, in random order.

    The first three are multiplied by 1 ± `strength` at most, as torchvision's `ColorJitter` does. The hue
    changes by at most `HUE_SHARE` of it, in turns.
    """
    import torch
    from torchvision.transforms.v2 import functional as F

    factors = rng.uniform(1 - strength, 1 + strength, 3).tolist()
    hue = float(rng.uniform(-strength, strength)) * HUE_SHARE
    steps = [
        lambda image: F.adjust_brightness(image, factors[0]),
        lambda image: F.adjust_contrast(image, factors[1]),
        lambda image: F.adjust_saturation(image, factors[2]),
        lambda image: F.adjust_hue(image, hue),
    ]
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    for step in rng.permutation(len(steps)).tolist():
        image = steps[step](image)
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _bounds(mask: Crop) -> Boxes:
    """Returns the corners of a trimmed mask."""
    x, y, crop = mask
    return np.array([x, y, x + crop.shape[1], y + crop.shape[0]], np.float32)


def _trimmed(mask: Crop) -> Crop | None:
    """Returns the mask cut to its bounds, or None if it has no pixel."""
    x, y, crop = mask
    rows, columns = np.flatnonzero(crop.any(axis=1)), np.flatnonzero(crop.any(axis=0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return x + left, y + top, crop[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]


def _without(mask: Crop, above: Crop) -> Crop | None:
    """Returns what another mask leaves of a mask, or None if no pixel remains."""
    x, y, crop = mask
    left, top, hiding = above
    h, w = hiding.shape
    rows = slice(max(top - y, 0), max(top + h - y, 0))
    columns = slice(max(left - x, 0), max(left + w - x, 0))
    rest = crop.copy()
    part = rest[rows, columns]
    start_y, start_x = max(y - top, 0), max(x - left, 0)
    part &= ~hiding[start_y : start_y + part.shape[0], start_x : start_x + part.shape[1]]
    return _trimmed((x, y, rest))
