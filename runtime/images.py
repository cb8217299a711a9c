"""Many images through a predictor: in order, few in memory, and none that ends the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from comask.errors import ImageError, one_line
from comask.preprocess import MOST_IMAGE_PIXELS, Pixels, Prepared
from comask.structures import Detections

if TYPE_CHECKING:
    from comask.runtime.predictor import Predictor

Key = TypeVar("Key")

MOST_WAITING_PIXELS = MOST_IMAGE_PIXELS  # decoded pixels in memory at once, or one image of more


@dataclass(frozen=True, slots=True)
class ImageResult(Generic[Key]):
    """What became of one image.

    Attributes:
        key: as it was given.
        pixels: u8 [h, w, 3] RGB, the decoded image; None where `error` is that of decoding it.
        found: its detections; None where there is an `error`.
        error: why it could not be run, as one line that names the image; empty where it was.
    """

    key: Key
    pixels: Pixels | None
    found: Detections | None
    error: str = ""


class ImageRunner(Generic[Key]):
    """Runs images; one that cannot be decoded or run is reported, and the others go on.

    Backends have no error in common that blames the image: there are engines with a largest canvas,
    lacking memory, NaN. When a batch fails, its images are run alone, and when one fails alone, a probe
    image is run that is known to be sound. Only when the probe fails too is the backend to blame, and the
    error is raised.

    Args:
        predictor: the loaded model.
        window: images that are decoded before they run, so that those of one canvas share batches.
    """

    def __init__(self, predictor: Predictor, window: int | None = None) -> None:
        self._predictor = predictor
        self._window = window or 2 * predictor.max_batch
        side = predictor.preprocess.short_side
        # black until a real image has succeeded, since an engine of few sizes may refuse a square
        self._probe = predictor.prepare(np.zeros((side, side, 3), dtype=np.uint8))

    def __call__(
        self, images: Iterable[tuple[Key, Callable[[], Pixels]]]
    ) -> Iterator[ImageResult[Key]]:
        """The result of each image, in order.

        Args:
            images: each with a function that decodes it, which may raise an ImageError.

        Raises:
            Exception: of any kind, when the backend is to blame and not an image.
        """
        window: list[tuple[Key, Pixels | None, str]] = []
        for key, decode in images:
            try:
                window.append((key, decode(), ""))
            except ImageError as error:
                window.append((key, None, one_line(error)))
            waiting = sum(pixels.size // 3 for _, pixels, _ in window if pixels is not None)
            if len(window) == self._window or waiting > MOST_WAITING_PIXELS:
                yield from self._results(window)
                window = []
        yield from self._results(window)

    def check(self) -> None:
        """Runs the probe image.

        Raises:
            Exception: of any kind, when that is impossible: the backend is to blame.
        """
        self._predictor.predict_prepared([self._probe])

    def _results(self, window: list[tuple[Key, Pixels | None, str]]) -> Iterator[ImageResult[Key]]:
        prepared: dict[int, Prepared] = {}
        errors: dict[int, str] = {}
        for place, (key, pixels, error) in enumerate(window):
            if pixels is None:
                errors[place] = error
                continue
            try:
                prepared[place] = self._predictor.prepare(pixels)
            except ImageError as problem:
                errors[place] = f"{key}: {one_line(problem)}"
        found = dict(zip(prepared, self._found(list(prepared.values())), strict=True))
        for place, (key, pixels, _) in enumerate(window):
            result = found.get(place)
            if isinstance(result, Detections):
                yield ImageResult(key, pixels, result)
            else:
                error = errors.get(place) or f"{key}: cannot be run: {result}"
                yield ImageResult(key, pixels, None, one_line(error))

    def _found(self, images: Sequence[Prepared]) -> list[Detections | str]:
        """Detections of each image, or what is wrong with it."""
        try:
            found = self._predictor.predict_prepared(images)
        except Exception as error:  # see the class
            if len(images) > 1:
                return [result for image in images for result in self._found([image])]
            self.check()
            return [one_line(error)]
        if images:
            self._probe = images[-1]
        return list(found)
