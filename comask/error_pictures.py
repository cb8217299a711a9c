"""Draws pairs of pictures whose instances are compared, with frames around those that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.data.source import Category, ImageInfo
from comask.error_analysis import ImageErrors, TaskErrors
from comask.error_matching import Results
from comask.evaluate import Truth

FRAME = (255, 0, 200)
GAP = 12  # pixels between the two pictures
QUALITY = 90

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A JPEG with its caption."""

    caption: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Side:
    """One of two sides of a picture.

    Attributes:
        entries: the COCO annotations or results to draw.
        framed: those of them that get a frame.
        categories: their classes in label order.
    """

    entries: Entries
    framed: Entries
    categories: Sequence[Category]


def draw_pair(image: NDArray[np.uint8], info: ImageInfo, *sides: Side) -> bytes:
    """Draws the sides on copies of one image, beside each other.

    Args:
        image: [H, W, 3] u8, RGB.
        info: the image's entry.
        sides: what to draw, from left to right. Entries without a score are drawn without one.

    Returns:
        A JPEG.
    """
    import cv2

    tiles: list[NDArray[np.uint8]] = []
    for side in sides:
        tile = _tile(image, info, side)
        tiles += [tile, np.full((tile.shape[0], GAP, 3), 255, np.uint8)]
    sheet = np.concatenate(tiles[:-1], axis=1)
    encoded = cv2.imencode(".jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    return encoded.tobytes()


def _tile(image: NDArray[np.uint8], info: ImageInfo, side: Side) -> NDArray[np.uint8]:
    import cv2

    from comask.data.coco import detections_from_coco
    from comask.draw import draw_tile

    drawn, framed = (
        detections_from_coco(entries, info, side.categories)
        for entries in (side.entries, side.framed)
    )
    scored = any("score" in entry for entry in side.entries)
    tile = draw_tile(image, drawn, show_scores=scored)
    scale = np.array(tile.shape[1::-1] * 2) / np.array(image.shape[1::-1] * 2)
    for x1, y1, x2, y2 in (framed.boxes_xyxy * scale).round().astype(int).tolist():
        for colour, thickness in (((255, 255, 255), 6), (FRAME, 3)):
            cv2.rectangle(tile, (x1 - 1, y1 - 1), (x2, y2), colour, thickness)
    return tile


def worst_pictures(errors: TaskErrors, truth: Truth, results: Results) -> list[Picture]:
    """Draws the images with most errors: the annotations, and the detections from the thresholds on.

    Framed are objects that no detection matches, and wrong detections.

    Args:
        errors: the errors of `results`.
        truth: the ground truth.
        results: the results that were analysed.

    Raises:
        ImageError: when an image cannot be decoded.
    """
    categories = truth.source.categories
    # The prepared truth numbers its categories from 1.
    numbered = [Category(id=n, name=c.name) for n, c in enumerate(categories, start=1)]
    thresholds = {
        category.id: found.threshold
        for category, found in zip(categories, errors.classes, strict=True)
    }
    pictures = []
    for image in errors.worst:
        index, rows = truth.indices[image.place], results[image.place]
        objects = truth.annotations[image.place]
        shown = [r for r in rows if r["score"] >= thresholds.get(r["category_id"], np.inf)]
        content = draw_pair(
            truth.source.image(index),
            truth.source.info(index),
            Side(objects, [objects[place] for place in image.not_found], numbered),
            Side(shown, [rows[place] for place in image.wrong], categories),
        )
        pictures.append(Picture(caption(image), content))
    return pictures


def caption(image: ImageErrors) -> str:
    """Returns the caption of an image's picture."""
    counts = ", ".join(f"{count} {kind}" for kind, count in image.kinds.items() if count)
    return (
        f"{image.file}: errors: {counts}; left: the annotations, {len(image.not_found)} framed because "
        f"no detection matches them; right: the detections, {len(image.wrong)} framed because they are "
        f"wrong"
    )
