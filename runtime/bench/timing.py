"""Times each part of a prediction, and frames in a stream, for backends that take turns.

Decoding is not timed: images are in memory.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig
from comask.errors import ComaskError, ImageError, one_line
from comask.preprocess import Pixels, decode_image, padded_shape, resized_shape, stacked
from comask.runtime.predictor import Predictor
from comask.runtime.stream import SLOTS, Future, StreamSession

# The parts of a prediction in order, with their names for people. `prepare` resizes, pads and stacks. The
# stages are timed by the GPU's clock if TensorRT runs them. `other` is the backend's work around them
# (copies to and from a GPU, freeing maps). `results` makes `Detections`.
PARTS = {
    "prepare": "prepare", "stage1": "stage 1", "stage2": "stage 2", "other": "other",
    "results": "results", "encode": "paste+RLE",
}  # fmt: skip
SUM = "sum"
MOST_WARM_UPS = 20
STEADY = 0.95  # a run below this fraction of all runs before it shows that the warm-up is not over

CAPTURED = (
    4  # number of batches of one shape after which a slot replays its CUDA graph, with a margin
)

Encoded = TypeVar("Encoded", Path, bytes, Path | bytes)  # an image's file, or its content

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of several runs in milliseconds, interpolated between the two nearest runs."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float] | NDArray[np.float64]) -> Percentiles:
        """Computes the percentiles of the seconds that each run took."""
        return cls(*(1000 * np.percentile(np.asarray(seconds), (50, 90, 99))).tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTiming:
    """The times of batches of frames in a `Predictor.stream`, from host memory to RLE.

    Attributes:
        milliseconds: the time of a batch while no other batch is in the stream.
        images_per_second: the rate while all slots are at work.
        slots: the stream's number of slots.
        gpu_bytes: bytes of the GPU's memory that a process takes meanwhile; None if that is unknown.
    """

    milliseconds: Percentiles
    images_per_second: float
    slots: int
    gpu_bytes: int | None = None


@dataclass
class Measured:
    """The measurements of one backend.

    Attributes:
        seconds: the seconds of each run, by `PARTS` and `SUM`.
        images: the number of images that were run.
        detections: the number of detections in them.
        cpu: this process's CPU time in seconds.
        warm_ups: the number of runs before the measured ones.
    """

    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {part: [] for part in (*PARTS, SUM)}
    )
    images: int = 0
    detections: int = 0
    cpu: float = 0.0
    warm_ups: int = 0

    def add(self, predictor: Predictor, images: Sequence[Pixels]) -> None:
        """Runs one batch and adds its measurements."""
        cpu = time.process_time()
        seconds, detections = timed(predictor, images)
        self.cpu += time.process_time() - cpu
        for part, value in seconds.items():
            self.seconds[part].append(value)
        self.images += len(images)
        self.detections += detections

    @property
    def median(self) -> float:
        """Median seconds per batch."""
        return float(np.median(self.seconds[SUM]))

    @property
    def cores(self) -> float:
        """The average number of busy CPU cores; a library that waits by spinning keeps one busy, too."""
        return self.cpu / sum(self.seconds[SUM])

    @property
    def images_per_second(self) -> float:
        """Images per second for batches one after the other."""
        return self.images / sum(self.seconds[SUM])

    @property
    def detections_per_image(self) -> float:
        """The average number of detections per image."""
        return self.detections / self.images


def timed(predictor: Predictor, images: Sequence[Pixels]) -> tuple[dict[str, float], int]:
    """Runs and times one batch of images of one canvas.

    Returns:
        the seconds by `PARTS` and `SUM`, and the number of detections.
    """
    marks = [time.perf_counter()]
    prepared = [predictor.prepare(image) for image in images]
    canvases, sizes = stacked(prepared)
    marks.append(time.perf_counter())
    stages: dict[str, float] = {}
    outputs = predictor.stages.run(canvases, sizes, seconds=stages)
    marks.append(time.perf_counter())
    detections = predictor.detections(outputs, prepared)
    marks.append(time.perf_counter())
    for of_image in detections:
        of_image.to_rle()
    marks.append(time.perf_counter())
    prepare, run, results, encode = np.diff(marks).tolist()
    seconds = {
        "prepare": prepare,
        **stages,
        # not below 0, since the two clocks may differ by more than the rest takes
        "other": max(0.0, run - sum(stages.values())),
        "results": results,
        "encode": encode,
        SUM: marks[-1] - marks[0],
    }
    return seconds, sum(map(len, detections))


def decoded(images: Iterable[Encoded]) -> Iterator[tuple[Encoded, Pixels]]:
    """Decodes images one after the other; those that cannot be decoded are logged and skipped."""
    for image in images:
        try:
            yield image, decode_image(image)
        except ImageError as error:
            logger.warning("skipped: %s", one_line(error))


def full_batches(
    images: Sequence[Pixels], preprocess: PreprocessConfig, batch: int
) -> list[list[Pixels]]:
    """Returns all images in batches of `batch` images of one canvas, in a seeded order.

    If a canvas has too few images, some of them are repeated, so that all batches have the same size.
    """
    by_canvas: dict[tuple[int, int], list[Pixels]] = {}
    for image in images:
        by_canvas.setdefault(canvas_of(image, preprocess), []).append(image)
    batches = [
        [same[(start + i) % len(same)] for i in range(batch)]
        for same in by_canvas.values()
        for start in range(0, len(same), batch)
    ]
    # in their first order, some runs would see only one canvas
    order = np.random.default_rng(0).permutation(len(batches))
    return [batches[i] for i in order]


def canvas_of(image: Pixels, preprocess: PreprocessConfig) -> tuple[int, int]:
    """Returns (H, W) of the canvas that an image gets."""
    height, width, _ = image.shape
    return padded_shape(resized_shape((height, width), preprocess), preprocess)


def check_batch(predictor: Predictor, batch: int) -> None:
    """Checks that the backend runs so many images together.

    Raises:
        ComaskError: if it runs fewer, although `Predictor.load` was given that many.
    """
    if predictor.max_batch < batch:
        raise ComaskError(
            f"{predictor.stages.backend} runs at most {predictor.max_batch} images together, a batch "
            f"of {batch} was asked for: give a smaller --batch, or export a wider engine"
        )


def warm_up(
    predictor: Predictor, batches: Sequence[Sequence[Pixels]], runs: int | None = None
) -> int:
    """Runs batches until they get no faster, each canvas at least once.

    Args:
        predictor: the predictor to warm up.
        batches: see `full_batches`.
        runs: the number of batches to run instead, if given.

    Returns:
        the number of batches that ran.
    """
    if runs is not None:
        for number in range(runs):
            timed(predictor, batches[number % len(batches)])
        return runs
    canvases = {predictor.prepare(batch[0]).canvas.shape: batch for batch in batches}
    *others, last = canvases.values()
    for batch in others:
        timed(predictor, batch)
    taken: list[float] = []
    while len(taken) < MOST_WARM_UPS and not is_steady(taken):
        taken.append(timed(predictor, last)[0][SUM])
    return len(others) + len(taken)


def is_steady(seconds: Sequence[float]) -> bool:
    """Returns whether the last two runs were less than 5 % faster than the fastest before them."""
    return len(seconds) > 2 and min(seconds[-2:]) >= STEADY * min(seconds[:-2])


def take_turns(
    predictors: Mapping[str, Predictor],
    batches: Mapping[str, Sequence[Sequence[Pixels]]],
    *,
    runs: int,
    warm_ups: int | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Measured]:
    """Runs one batch on every predictor in turn, so that other load affects all of them alike.

    Args:
        predictors: the predictors by name.
        batches: the batches of each, see `full_batches`; repeated if they are fewer than `runs`.
        runs: the number of batches to run on each.
        warm_ups: see `warm_up`.
        advance: called after each turn of all predictors.
    """
    measured = {
        name: Measured(warm_ups=warm_up(predictor, batches[name], warm_ups))
        for name, predictor in predictors.items()
    }
    for run in range(runs):
        for name, predictor in predictors.items():
            measured[name].add(predictor, batches[name][run % len(batches[name])])
        advance()
    return measured


def measure_stream(
    predictor: Predictor, batches: Sequence[Sequence[Pixels]], *, runs: int
) -> StreamTiming:
    """Times the batches of `full_batches` in a stream.

    Canvases are measured one after the other, since a slot's graph belongs to the last canvas that it
    ran, and a camera has only one canvas.
    """
    by_canvas: dict[tuple[int, int], list[Sequence[Pixels]]] = {}
    for batch in islice(cycle(batches), runs):
        by_canvas.setdefault(canvas_of(batch[0], predictor.preprocess), []).append(batch)
    alone: list[float] = []
    seconds = 0.0
    for same in by_canvas.values():
        with predictor.stream(slots=SLOTS) as session:
            fill_slots(session, same[0], CAPTURED)
            alone += [next(streamed(session, [list(batch)]))[0] for batch in same]
            seconds += _overlapped(session, same)
    rate = sum(map(len, islice(cycle(batches), runs))) / seconds
    return StreamTiming(milliseconds=Percentiles.of(alone), images_per_second=rate, slots=SLOTS)


def fill_slots(session: StreamSession, batch: Sequence[Pixels], times: int) -> None:
    """Runs a batch in each of a session's `SLOTS` slots, which grow and capture independently."""
    for _ in range(times):
        list(streamed(session, [list(batch)] * SLOTS))


def _overlapped(session: StreamSession, batches: Sequence[Sequence[Pixels]]) -> float:
    """Returns the seconds that `batches` take while all slots are at work."""
    runs = max(len(batches), 4 * SLOTS)  # with fewer, most slots would be filling or draining
    started = time.perf_counter()
    list(streamed(session, map(list, islice(cycle(batches), runs))))
    return (time.perf_counter() - started) * len(batches) / runs


def streamed(
    session: StreamSession, batches: Iterable[Pixels | list[Pixels]]
) -> Iterator[tuple[float, int]]:
    """Runs frames or batches in a session, `SLOTS` at once.

    Yields:
        for each in turn, the seconds from submission to RLEs and the number of detections.
    """
    waiting: deque[tuple[float, Future]] = deque()

    def finish() -> tuple[float, int]:
        started, future = waiting.popleft()
        result = future.result()
        detections = result if isinstance(result, list) else [result]
        count = sum(len(of_frame.to_rle()) for of_frame in detections)
        return time.perf_counter() - started, count

    for batch in batches:
        if len(waiting) == SLOTS:
            yield finish()
        waiting.append((time.perf_counter(), session.submit(batch, rle=True)))
    while waiting:
        yield finish()
