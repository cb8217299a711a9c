"""Pictures of disagreement: an image with the detections of two backends side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comask.data.source import InstanceSource
from comask.runtime.parity.judge import Entries, pairs

if TYPE_CHECKING:
    from comask.structures import Detections

WORST, SAME = 3, 0.999  # images a contestant, and the agreement from which on none is worth a look
SHOWN, AT_LEAST = 0.3, 3  # detections from this score on; without any, so many of the best
UNMATCHED = (255, 0, 200)
GAP = 12  # pixels between the two


def side_by_side(
    source: InstanceSource,
    index: int,
    reference: tuple[str, Entries],
    other: tuple[str, Entries],
    value: float,
) -> tuple[str, bytes]:
    """A caption, and a JPEG: the reference's detections left, the other's right.

    Detections of one that the other has none of are framed.

    Args:
        source: with the image.
        index: of the image.
        reference: its name and COCO results on the image.
        other: likewise.
        value: their agreement.
    """
    import cv2

    from comask.data.coco import detections_from_coco

    info, categories, image = source.info(index), source.categories, source.image(index)
    known = {category.id for category in categories}
    shown = [
        _shown([entry for entry in entries if entry["category_id"] in known])
        for _, entries in (reference, other)
    ]
    everything = reference[1], other[1]
    lone = [
        [entry for i, entry in enumerate(mine) if i not in matched]
        for mine, matched in (
            (shown[0], {i for i, _, _ in pairs(shown[0], everything[1])}),
            (shown[1], {j for _, j, _ in pairs(everything[0], shown[1])}),
        )
    ]
    tiles = [
        _tile(image, detections_from_coco(mine, info, categories),
              detections_from_coco(alone, info, categories))
        for mine, alone in zip(shown, lone, strict=True)
    ]  # fmt: skip
    gap = np.full((tiles[0].shape[0], GAP, 3), 255, np.uint8)
    sheet = np.concatenate((tiles[0], gap, tiles[1]), axis=1)
    content = cv2.imencode(".jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    caption = (
        f"{info.file_name or info.id}: agreement {value:.3f}; left {reference[0]}, {len(shown[0])} "
        f"detections, {len(lone[0])} of them framed as {other[0]} has no such; right {other[0]}, "
        f"{len(shown[1])}, {len(lone[1])} framed"
    )
    return caption, content


def _shown(entries: Entries) -> Entries:
    ranked = sorted(entries, key=lambda entry: -entry["score"])
    return [entry for entry in ranked if entry["score"] >= SHOWN] or ranked[:AT_LEAST]


def _tile(image: NDArray[np.uint8], found: Detections, alone: Detections) -> NDArray[np.uint8]:
    """The overlay with frames around what stands alone."""
    import cv2

    from comask.draw import draw_tile

    tile = draw_tile(image, found)
    scale = np.array(tile.shape[1::-1] * 2) / np.array(image.shape[1::-1] * 2)
    for x1, y1, x2, y2 in (alone.boxes_xyxy * scale).round().astype(int).tolist():
        for colour, thickness in (((255, 255, 255), 6), (UNMATCHED, 3)):
            cv2.rectangle(tile, (x1 - 1, y1 - 1), (x2, y2), colour, thickness)
    return tile
