"""Detections whose masks are given as pixels, and a network that finds what colours say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from comask.config import PreprocessConfig
from comask.masks import run_length_mask
from comask.runtime.views import ViewedPredictor, Views
from comask.structures import Detections


def bounds(mask: np.ndarray) -> list[int]:
    """x1, y1, x2, y2 of a mask's pixels."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def detections(
    masks: Sequence[np.ndarray],
    size: tuple[int, int],
    scores: Sequence[float] | None = None,
    labels: Sequence[int] | None = None,
) -> Detections:
    """Detections with these masks and the boxes around them, in the order given."""
    count = len(masks)
    return Detections(
        boxes_xyxy=np.array([bounds(mask) for mask in masks], np.float32).reshape(-1, 4),
        scores=np.array([0.9] * count if scores is None else scores, np.float32),
        labels=np.array([0] * count if labels is None else labels, np.int64),
        mask_probs=np.zeros((count, 0, 0), np.float32),
        run_length_masks=tuple(run_length_mask(0, 0, mask, size) for mask in masks),
        image_size=size,
    )


class ColourNetwork:
    """Finds in a canvas what its pixels say: (number of the object or 0, class, percent of the score).

    It sees nothing in what was resized, whose colours are mixed. It takes part as a `FramePredictor`.
    """

    mask_threshold = 0.5

    def __init__(self, tile: int, max_batch: int = 4) -> None:
        self.preprocess = PreprocessConfig(short_side=tile, max_side=tile)
        self.max_batch, self.stages = max_batch, self
        self.batches: list[tuple[int, ...]] = []

    def run(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
        self.batches.append(images.shape[:3])
        return {"canvas": images}

    def detections(self, outputs: Any, placements: Sequence[Any]) -> list[Detections]:
        found = []
        for canvas, place in zip(outputs["canvas"], placements, strict=True):
            image = canvas[: place.size[0], : place.size[1]]
            whole = image if place.size == place.original_size else image[:0]
            numbers = sorted(set(whole[..., 0].flat) - {0})
            masks = [whole[..., 0] == number for number in numbers]
            _, labels, scores = np.array([whole[m][0] for m in masks]).reshape(-1, 3).T.tolist()
            found.append(detections(masks, place.original_size, np.array(scores) / 100, labels))
        return found

    def look_at(self, image: np.ndarray, **views: Any) -> Detections:
        """Runs one image in several views."""
        predictor = ViewedPredictor(self, Views(**views))  # type: ignore[arg-type]
        return predictor.predict_stages([predictor.prepare(image)])[0]["final"]
