"""Runs images: decodes them, batches them by canvas, and returns results in order, errors included."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np

from comask.config import PreprocessConfig
from comask.errors import ImageError, one_line
from comask.preprocess import MOST_IMAGE_PIXELS, Pixels, Prepared
from comask.structures import Detections

Item = TypeVar("Item")
FoundAt: TypeAlias = Mapping[str, Detections]  # by the names of `FOUND_AT`

# The points at which the network's detections can be read, and for each the outputs that replace stage
# 2's own: its result, the proposals with the coarse masks, and the boxes for which all cells count alike.
FOUND_AT: dict[str, dict[str, str]] = {
    "final": {},
    "first": {"boxes": "first_boxes", "masks": "coarse_masks"},
    "plain": {"boxes": "plain_boxes"},
}


def batches(kinds: Iterable[Hashable], largest: int) -> Iterator[list[int]]:
    """Yields batches of the indices of items of the same kind, at most `largest` per batch."""
    same: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        same.setdefault(kind, []).append(index)
    for indices in same.values():
        for start in range(0, len(indices), largest):
            yield indices[start : start + largest]


@dataclass(frozen=True, slots=True)
class ImageResult(Generic[Item]):
    """The result of one image.

    Attributes:
        item: the item that was given.
        pixels: u8 [h, w, 3] RGB, the decoded image; None if it cannot be decoded.
        stages: its detections at each point of `FOUND_AT` that the backend returns; empty with an
            `error`.
        error: the reason why it has no detections; the text names the image. Else None.
    """

    item: Item
    pixels: Pixels | None
    stages: Mapping[str, Detections] = field(default_factory=dict)
    error: ImageError | None = None

    @property
    def detections(self) -> Detections:
        """The final detections.

        Raises:
            ImageError: if the image has none; see `error`.
        """
        if self.error is not None:
            raise self.error
        return self.stages["final"]


class ImagePredictor(Protocol):
    """The part of a `Predictor` that its `ImageRunner` needs."""

    preprocess: PreprocessConfig
    max_batch: int

    def prepare(self, image: Pixels) -> Prepared:
        """Puts an image on its canvas."""

    def predict_stages(self, prepared: Sequence[Prepared]) -> Sequence[FoundAt]:
        """Returns each image's detections at each point of `FOUND_AT`."""


class ImageRunner:
    """Runs images; one that cannot be decoded or run is reported, and the others go on.

    Backends have no common error that blames an image: some engines have a largest canvas, memory runs
    out, results become NaN. If a batch fails, its images run one by one. If one of them fails, a probe
    image runs that is known to be valid. Only if the probe fails as well, the backend is to blame, and
    its error is raised.

    Args:
        predictor: the predictor that runs the images.
    """

    def __init__(self, predictor: ImagePredictor) -> None:
        self._predictor = predictor
        # Images are decoded before they run, so that those of one canvas share batches. The window is
        # large enough for a full batch of each of two canvases, as in data of mixed orientation.
        self._window = 2 * predictor.max_batch
        side = predictor.preprocess.short_side
        # probe image: black until a real image has succeeded, since some engines refuse a square canvas
        self._probe = predictor.prepare(np.zeros((side, side, 3), dtype=np.uint8))

    def run(
        self, items: Iterable[Item], decode: Callable[[Item], Pixels], *, isolate: bool = True
    ) -> Iterator[ImageResult[Item]]:
        """Yields the result of each image, in order; see `Predictor.map`."""
        window: list[tuple[str, ImageResult[Item]]] = []
        waiting = 0  # pixels in the window
        for number, item in enumerate(items):
            # arrays and Pillow images have no name
            name = f"image {number}" if hasattr(item, "__array_interface__") else str(item)
            try:
                result = ImageResult(item, decode(item))
            except ImageError as error:
                result = ImageResult(item, None, error=error)
            window.append((name, result))
            waiting += 0 if result.pixels is None else result.pixels.size // 3
            # the limit for one image is the limit for the whole window as well
            if len(window) == self._window or waiting > MOST_IMAGE_PIXELS:
                yield from self._results(window, isolate)
                window, waiting = [], 0
        yield from self._results(window, isolate)

    def check(self) -> None:
        """Runs the probe image.

        Raises:
            Exception: of any kind, if it fails; the backend is then to blame.
        """
        self._predictor.predict_stages([self._probe])

    def _results(
        self, window: list[tuple[str, ImageResult[Item]]], isolate: bool
    ) -> Iterator[ImageResult[Item]]:
        prepared: dict[int, Prepared] = {}
        errors: dict[int, ImageError] = {}
        for place, (name, result) in enumerate(window):
            if result.pixels is not None:
                try:
                    prepared[place] = self._predictor.prepare(result.pixels)
                except ImageError as error:
                    errors[place] = ImageError(f"{name}: {error}")
        images = list(prepared.values())
        outcomes = self._isolated(images) if isolate else self._predictor.predict_stages(images)
        by_place = dict(zip(prepared, outcomes, strict=True))
        for place, (name, result) in enumerate(window):
            outcome = by_place.get(place)
            if isinstance(outcome, Exception):
                errors[place] = ImageError(f"{name}: cannot be run: {one_line(outcome)}")
            elif outcome is not None:
                result = replace(result, stages=outcome)
            yield replace(result, error=errors[place]) if place in errors else result

    def _isolated(self, images: Sequence[Prepared]) -> list[FoundAt | Exception]:
        """Returns each image's detections, or its error."""
        try:
            stages = self._predictor.predict_stages(images)
        except Exception as error:  # of any kind, as the class explains
            if len(images) > 1:
                return [result for image in images for result in self._isolated([image])]
            self.check()
            return [error]
        if images:
            self._probe = images[-1]
        return list(stages)
