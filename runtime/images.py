"""Runs images: decodes them, batches them by canvas, and returns results in order, errors included."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np

from comask.config import PreprocessConfig
from comask.errors import ImageError, one_line
from comask.parallel import ordered_map
from comask.preprocess import MOST_IMAGE_PIXELS, Pixels
from comask.structures import Detections

Item = TypeVar("Item")
FoundAt: TypeAlias = Mapping[str, Detections]  # by the names of `FOUND_AT`
Outcome: TypeAlias = FoundAt | Exception  # of an image that was run
Ready: TypeAlias = Any  # an image as `ImagePredictor.prepare` returns it

# The points at which the network's detections can be read, and for each the outputs that replace stage
# 2's own, if there are such: its result, the proposals with the coarse masks, and the boxes for which all
# cells count alike.
FOUND_AT: dict[str, dict[str, str]] = {
    "final": {},
    "first": {
        "boxes": "first_boxes",
        "masks": "coarse_masks",
        "mask_boxes": "first_boxes",
        "scores": "class_scores",
    },
    "plain": {"boxes": "plain_boxes", "mask_boxes": "plain_boxes"},
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
    """What an `ImageRunner` needs of a predictor: a `Predictor`, or one of several views."""

    @property
    def preprocess(self) -> PreprocessConfig:
        """Resize and padding."""

    @property
    def max_batch(self) -> int:
        """The number of canvases of one size that run together."""

    def prepare(self, image: Pixels) -> Ready:
        """Makes an image ready to run.

        Raises:
            ImageError: if it is not an image.
        """

    def predict_stages(self, images: Sequence[Ready]) -> Sequence[FoundAt]:
        """Returns each image's detections, at `final` and the other points of `FOUND_AT` that it has."""


@dataclass(frozen=True, slots=True)
class _Decoded(Generic[Item]):
    """An image before it runs: its name, its result so far and, if it can run, what runs."""

    name: str
    result: ImageResult[Item]
    prepared: Ready | None = None


@dataclass(slots=True)
class _Window(Generic[Item]):
    """Images that run together, in order.

    Attributes:
        names: the name of each image.
        results: the result of each image, as far as it is known before the image has run.
        prepared: the images that can run, by their places.
        pixels: the number of all pixels.
        failure: the error with which the items ended, if they did.
    """

    names: list[str] = field(default_factory=list)
    results: list[ImageResult[Item]] = field(default_factory=list)
    prepared: dict[int, Ready] = field(default_factory=dict)
    pixels: int = 0
    failure: Exception | None = None

    def add(self, image: _Decoded[Item]) -> None:
        """Adds an image, which runs if it is prepared."""
        if image.prepared is not None:
            self.prepared[len(self.results)] = image.prepared
        if image.result.pixels is not None:
            self.pixels += image.result.pixels.size // 3
        self.names.append(image.name)
        self.results.append(image.result)

    def finished(self, outcomes: Sequence[Outcome]) -> Iterator[ImageResult[Item]]:
        """Yields the result of each image."""
        by_place = dict(zip(self.prepared, outcomes, strict=True))
        for place, (name, result) in enumerate(zip(self.names, self.results, strict=True)):
            outcome = by_place.get(place)
            if isinstance(outcome, Exception):
                error = ImageError(f"{name}: cannot be run: {one_line(outcome)}")
                yield replace(result, error=error)
            else:
                yield result if outcome is None else replace(result, stages=outcome)


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
        """Yields the result of each image, in order; see `Predictor.map`.

        While one thread runs a window on the backend, others decode and prepare the next one.
        """
        before, running = _Window[Item](), Future[Sequence[Outcome]]()
        running.set_result([])
        with ThreadPoolExecutor(1, "comask") as backend:
            for window in self._windows(items, decode):
                outcomes, images = running.result(), list(window.prepared.values())
                running = backend.submit(self._outcomes, images, isolate)
                yield from before.finished(outcomes)
                before = window
            yield from before.finished(running.result())
            if before.failure:
                raise before.failure

    def _windows(
        self, items: Iterable[Item], decode: Callable[[Item], Pixels]
    ) -> Iterator[_Window[Item]]:
        """Yields windows of prepared images.

        If the items end with an error, the last window has it, so that the images before get results.
        """

        def named(numbered: tuple[int, Item]) -> _Decoded[Item]:
            number, item = numbered
            # arrays and Pillow images have no name
            name = f"image {number}" if hasattr(item, "__array_interface__") else str(item)
            return self._decoded(name, item, decode)

        window = _Window[Item]()
        try:
            for _, decoded in ordered_map(named, enumerate(items)):
                window.add(decoded.result())
                # the limit for one image is the limit for the whole window as well
                if len(window.results) == self._window or window.pixels > MOST_IMAGE_PIXELS:
                    yield window
                    window = _Window[Item]()
        except Exception as error:
            window.failure = error
        yield window

    def _decoded(self, name: str, item: Item, decode: Callable[[Item], Pixels]) -> _Decoded[Item]:
        """Decodes and prepares an image."""
        try:
            pixels = decode(item)
        except ImageError as error:
            return _Decoded(name, ImageResult(item, None, error=error))
        try:
            return _Decoded(name, ImageResult(item, pixels), self._predictor.prepare(pixels))
        except ImageError as error:
            named = ImageError(f"{name}: {error}")
            return _Decoded(name, ImageResult(item, pixels, error=named))

    def check(self) -> None:
        """Runs the probe image.

        Raises:
            Exception: of any kind, if it fails; the backend is then to blame.
        """
        self._predictor.predict_stages([self._probe])

    def _outcomes(self, images: Sequence[Ready], isolate: bool) -> Sequence[Outcome]:
        return self._isolated(images) if isolate else self._predictor.predict_stages(images)

    def _isolated(self, images: Sequence[Ready]) -> list[Outcome]:
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
