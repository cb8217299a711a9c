"""The way of images: decoded, batched by canvas, run, in order; none that fails ends the others."""

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

# What the network found at each point, and the outputs that give it in place of stage 2's own:
# its result, the proposals with the coarse masks, and the boxes of cells that all count alike.
FOUND_AT: dict[str, dict[str, str]] = {
    "final": {},
    "first": {"boxes": "first_boxes", "masks": "coarse_masks"},
    "plain": {"boxes": "plain_boxes"},
}


def batches(kinds: Iterable[Hashable], largest: int) -> Iterator[list[int]]:
    """Indices of things of the same kind, at most `largest` in a batch."""
    same: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        same.setdefault(kind, []).append(index)
    for indices in same.values():
        for start in range(0, len(indices), largest):
            yield indices[start : start + largest]


@dataclass(frozen=True, slots=True)
class ImageResult(Generic[Item]):
    """What became of one image.

    Attributes:
        item: as it was given.
        pixels: u8 [h, w, 3] RGB, the decoded image; None where it cannot be decoded.
        stages: its detections at each point of `FOUND_AT` that the backend tells; empty with an `error`.
        error: why it has no detections; its text names the image.
    """

    item: Item
    pixels: Pixels | None
    stages: Mapping[str, Detections] = field(default_factory=dict)
    error: ImageError | None = None

    @property
    def detections(self) -> Detections:
        """The final detections.

        Raises:
            ImageError: the image has none; see `error`.
        """
        if self.error is not None:
            raise self.error
        return self.stages["final"]


class ImagePredictor(Protocol):
    """What an `ImageRunner` needs of the `Predictor` that made it."""

    preprocess: PreprocessConfig
    max_batch: int

    def prepare(self, image: Pixels) -> Prepared:
        """Puts an image on its canvas."""

    def predict_stages(self, prepared: Sequence[Prepared]) -> Sequence[FoundAt]:
        """Detections of each image at each point of `FOUND_AT`."""


class ImageRunner:
    """Runs images; one that cannot be decoded or run is reported, and the others go on.

    Backends share no error that blames the image: some engines have a largest canvas, memory runs out,
    results become NaN. When a batch fails, its images run alone, and when one fails alone, a probe image
    runs that is known to be sound. Only when the probe fails too, the backend is to blame, and its error
    is raised.

    Args:
        predictor: that runs them.
    """

    def __init__(self, predictor: ImagePredictor) -> None:
        self._predictor = predictor
        # images are decoded before they run, so that those of one canvas share batches: enough for a
        # full batch of each of two canvases, as in a set of mixed orientation
        self._window = 2 * predictor.max_batch
        side = predictor.preprocess.short_side
        # black until a real image has succeeded, since an engine of few sizes may refuse a square
        self._probe = predictor.prepare(np.zeros((side, side, 3), dtype=np.uint8))

    def run(
        self, items: Iterable[Item], decode: Callable[[Item], Pixels], *, isolate: bool = True
    ) -> Iterator[ImageResult[Item]]:
        """The result of each image, in order; see `Predictor.map`."""
        window: list[tuple[str, ImageResult[Item]]] = []
        waiting = 0  # pixels
        for number, item in enumerate(items):
            # arrays and Pillow images have no name
            name = f"image {number}" if hasattr(item, "__array_interface__") else str(item)
            try:
                result = ImageResult(item, decode(item))
            except ImageError as error:
                result = ImageResult(item, None, error=error)
            window.append((name, result))
            waiting += 0 if result.pixels is None else result.pixels.size // 3
            # the limit of one image is that of all that wait, so one of more runs alone
            if len(window) == self._window or waiting > MOST_IMAGE_PIXELS:
                yield from self._results(window, isolate)
                window, waiting = [], 0
        yield from self._results(window, isolate)

    def check(self) -> None:
        """Runs the probe image.

        Raises:
            Exception: of any kind, when that is impossible: the backend is to blame.
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
        found = self._isolated(images) if isolate else self._predictor.predict_stages(images)
        stages = dict(zip(prepared, found, strict=True))
        for place, (name, result) in enumerate(window):
            got = stages.get(place)
            if isinstance(got, Exception):
                errors[place] = ImageError(f"{name}: cannot be run: {one_line(got)}")
            elif got is not None:
                result = replace(result, stages=got)
            yield replace(result, error=errors[place]) if place in errors else result

    def _isolated(self, images: Sequence[Prepared]) -> list[FoundAt | Exception]:
        """Detections of each image, or what is wrong with it."""
        try:
            found = self._predictor.predict_stages(images)
        except Exception as error:  # see the class
            if len(images) > 1:
                return [result for image in images for result in self._isolated([image])]
            self.check()
            return [error]
        if images:
            self._probe = images[-1]
        return list(found)
