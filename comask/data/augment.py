"""Augments training images: flips, quarter turns, crops, pasted objects, sizes and colours.

A pixel of an image and of a mask is moved, copied or left out, but never interpolated, so that masks stay
exact; only pasted objects of other images are resampled. Boxes follow their masks. The images are resized
later, by `comask.preprocess.prepare`, as for every backend. Masks are kept as crops: bitmaps of whole
images, which torchvision's transforms need, would take gigabytes for hundreds of objects.
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

HUE_SHARE = (
    0.1  # of `data.colour`: larger shifts turn classes that differ by colour into each other
)
PASTED_SCALES = 0.5, 1.5  # of pasted objects, against their size beside the image's own


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
    """Augments an image; what is drawn from `rng` depends on the settings alone.

    Args:
        sample: the image.
        config: the settings of the augmentation.
        preprocess: the settings of resize and padding.
        rng: the source of all that is random.
        other: returns another image of the data set, from which objects are pasted.

    Returns:
        The augmented image, and the settings by which to resize it.
    """
    if rng.random() < config.flip_probability:
        sample = flipped(sample)
    if config.vertical_flip_probability and rng.random() < config.vertical_flip_probability:
        sample = turned(flipped(sample), 2)
    if config.turn_probability and rng.random() < config.turn_probability:
        sample = turned(sample, int(rng.integers(1, 4)))
    if config.copy_paste_probability and rng.random() < config.copy_paste_probability:
        sample = with_pasted(sample, other(), preprocess, rng)
    if config.short_sides:
        side = int(rng.choice(config.short_sides))
        preprocess = dataclasses.replace(preprocess, short_side=side)
    least, most = config.scale_range
    if most > least or least != 1:
        factor = float(rng.uniform(least, most))
        if factor > 1:
            sample = cropped(sample, factor, rng)
        else:
            preprocess = preprocess.resized(max(1, round(preprocess.short_side * factor)))
    if config.colour:
        pixels = coloured(sample.pixels, config.colour, rng)
        sample = dataclasses.replace(sample, pixels=pixels)
    return sample, preprocess


def flipped(sample: Sample) -> Sample:
    """Returns the image with left and right exchanged."""
    _, width = sample.size
    boxes, crowds = sample.boxes.copy(), sample.crowds.copy()
    for corners in (boxes, crowds):
        corners[:, [0, 2]] = width - corners[:, [2, 0]]
    return Sample(
        pixels=np.ascontiguousarray(sample.pixels[:, ::-1]),
        boxes=boxes,
        crowds=crowds,
        labels=sample.labels,
        masks=[
            (width - x - crop.shape[1], y, np.ascontiguousarray(crop[:, ::-1]))
            for x, y, crop in sample.masks
        ],
    )


def turned(sample: Sample, quarters: int) -> Sample:
    """Returns the image after this number of quarter turns against the clock."""
    for _ in range(quarters):
        _, width = sample.size
        boxes, crowds = (
            np.stack([b[:, 1], width - b[:, 2], b[:, 3], width - b[:, 0]], axis=1)
            for b in (sample.boxes, sample.crowds)
        )
        sample = Sample(
            pixels=np.ascontiguousarray(np.rot90(sample.pixels)),
            boxes=boxes,
            crowds=crowds,
            labels=sample.labels,
            masks=[
                (y, width - x - crop.shape[1], np.ascontiguousarray(np.rot90(crop)))
                for x, y, crop in sample.masks
            ],
        )
    return sample


def cropped(sample: Sample, factor: float, rng: Rng) -> Sample:
    """Returns a random part of the image with sides of 1 / `factor`.

    Objects without a pixel in it are left out. The box of an object that is cut gets the bounds of the
    rest of its mask.
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
        whole = part[2].sum() == crop.sum()
        corners = (box - (left, top, left, top)).clip(0, (w, h, w, h)) if whole else _bounds(part)
        boxes.append(corners)
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
    """Returns the image with some objects of another one pasted over it (Ghiasi et al., CVPR 2021).

    About half of the donor's objects are pasted at random places, near the size that they have beside the
    image's own objects when both are resized. Objects that they hide completely are left out; the box of
    an object that they hide in part gets the bounds of the rest of its mask.
    """
    from comask.preprocess import resized_shape

    height, width = sample.size
    scales = [resized_shape(*s.size, preprocess)[0] / s.size[0] for s in (donor, sample)]
    pixels = sample.pixels.copy()
    covered = np.zeros(sample.size, bool)
    pasted: list[tuple[int, Crop]] = []
    for label, (x, y, crop) in zip(donor.labels, donor.masks, strict=True):
        chosen, factor, across, down = rng.random(4)  # drawn for all, so that choices do not shift
        if chosen < 0.5:
            continue
        least, most = PASTED_SCALES
        scale = scales[0] / scales[1] * (least + (most - least) * factor)
        h, w = (max(1, min(round(n * scale), limit))
                for n, limit in zip(crop.shape, sample.size, strict=True))  # fmt: skip
        mask = cv2.resize(crop.view(np.uint8), (w, h), interpolation=cv2.INTER_NEAREST).astype(bool)
        top, left = round(down * (height - h)), round(across * (width - w))
        part = _trimmed((left, top, mask))
        if part is None:
            continue
        source = donor.pixels[y : y + crop.shape[0], x : x + crop.shape[1]]
        shrinks = h * w < source.shape[0] * source.shape[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        place = slice(top, top + h), slice(left, left + w)
        pixels[place][mask] = cv2.resize(source, (w, h), interpolation=method)[mask]
        covered[place] |= mask
        pasted = [(kind, rest) for kind, m in pasted if (rest := _without(m, (left, top, mask)))]
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
    """Changes brightness, contrast and saturation by up to ±`strength`, and the hue by a tenth of it.

    The steps are torchvision's, in a random order.
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
    """Returns the part of a mask that another one does not hide, or None if it is hidden completely."""
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
