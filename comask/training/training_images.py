"""Draws a grid of what training sees: augmented images with their boxes and masks."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import TRUE_MASK_SIZE
from comask.data.loading import epoch_batches
from comask.data.training_set import Target, TrainingSet
from comask.draw import draw_tile
from comask.files import write_whole
from comask.structures import Detections

SHOWN = 16  # images of the first batches
NAME = "training_images.jpg"
_GAP, _PAPER, _QUALITY = 4, 255, 90


def draw_training_images(dataset: TrainingSet, batch_size: int, folder: Path) -> None:
    """Writes `training_images.jpg`: the first images of a run, as the network gets them.

    Args:
        dataset: the run's training images.
        batch_size: the number of images of a step.
        folder: the run's folder.

    Raises:
        ImageError: when no image can be decoded.
    """
    from PIL import Image

    batches = epoch_batches(dataset, batch_size, dataset.seed, 0)
    names = tuple(category.name for category in dataset.source.categories)
    tiles = []
    for key in [key for batch in batches for key in batch][:SHOWN]:
        canvas, (height, width), target, _ = dataset[key]
        shown = true_detections(target, (height, width), names)
        tiles.append(draw_tile(canvas[:height, :width].numpy(), shown, show_scores=False))
    columns = math.ceil(math.sqrt(len(tiles)))
    height, width = (max(tile.shape[axis] for tile in tiles) + _GAP for axis in (0, 1))
    rows = math.ceil(len(tiles) / columns)
    sheet = np.full((rows * height, columns * width, 3), _PAPER, np.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * height, place % columns * width
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, "JPEG", quality=_QUALITY)
    write_whole(folder / NAME, content.getvalue())


def true_detections(target: Target, size: tuple[int, int], names: tuple[str, ...]) -> Detections:
    """Converts a target to detections on its canvas, whose boxes are those that training learns.

    Args:
        target: the ground truth.
        size: (h, w) of the image on its canvas in pixels.
        names: the classes in label order.
    """
    boxes = target.boxes.numpy().reshape(-1, 4)
    probs = [
        _cells(crop.numpy(), box, x, y)
        for (x, y, crop), box in zip(
            target.masks.crops(), boxes * target.mask_scale.numpy(), strict=True
        )
    ]
    return Detections(
        boxes_xyxy=boxes,
        scores=np.ones(len(boxes), np.float32),
        labels=target.labels.numpy(),
        mask_probs=np.array(probs, np.float32).reshape(-1, TRUE_MASK_SIZE, TRUE_MASK_SIZE),
        image_size=size,
        class_names=names,
    )


def _cells(
    crop: NDArray[np.uint8], box: NDArray[np.float32], left: int, top: int
) -> NDArray[np.uint8]:
    """Returns the values of a mask at the centres of the cells into which its box is divided."""
    steps = (np.arange(TRUE_MASK_SIZE) + 0.5) / TRUE_MASK_SIZE
    x1, y1, x2, y2 = box.tolist()
    h, w = crop.shape
    columns = (np.floor(x1 + steps * (x2 - x1)) - left).clip(-1, w).astype(int)
    rows = (np.floor(y1 + steps * (y2 - y1)) - top).clip(-1, h).astype(int)
    return np.asarray(np.pad(crop, 1)[np.ix_(rows + 1, columns + 1)])
