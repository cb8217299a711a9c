"""Seconds of each part of a prediction, and of frames in a stream, of backends that take turns.

Decoding is no part of it: images are in memory.
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
from comask.preprocess import Pixels, decode_image, padded_shape, resized_shape
from comask.runtime.predictor import Predictor
from comask.runtime.stream import SLOTS, Future, StreamSession

# What a prediction consists of, in order, and the names of it for people. `prepare` resizes, pads and
# stacks; the stages are timed by the GPU's clock where TensorRT runs them; `other` is what else a backend
# does around them (copies to and from a GPU, freeing maps); `results` makes `Detections`.
PARTS = {
    "prepare": "prepare", "stage1": "stage 1", "stage2": "stage 2", "other": "other",
    "results": "results", "encode": "paste+RLE",
}  # fmt: skip
SUM = "sum"
MOST_WARM_UPS = 20
STEADY = 0.95  # a run that takes less than this part of all before it shows that more may follow

CAPTURED = 4  # batches of a shape in a slot until its CUDA graph is replayed, with a margin

Encoded = TypeVar("Encoded", Path, bytes, Path | bytes)  # an image's file, or its content

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of several runs, in milliseconds, interpolated between the two nearest runs."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float] | NDArray[np.float64]) -> Percentiles:
        """The percentiles of the seconds that each run took."""
        return cls(*(1000 * np.percentile(np.asarray(seconds), (50, 90, 99))).tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTiming:
    """Batches of frames in a `Predictor.stream`, from host memory to RLE.

    Attributes:
        milliseconds: of a batch that is alone.
        images_per_second: when as many batches are under way as there are slots.
        slots: of the stream.
        gpu_bytes: of the GPU's memory that a process takes meanwhile; None where that is unknown.
    """

    milliseconds: Percentiles
    images_per_second: float
    slots: int
    gpu_bytes: int | None = None


@dataclass
class Measured:
    """What one backend took.

    Attributes:
        seconds: of each run, by `PARTS` and `SUM`.
        images: that were run.
        detections: that were found.
        cpu: seconds of CPU time of this process.
        warm_ups: runs before these.
    """

    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {part: [] for part in (*PARTS, SUM)}
    )
    images: int = 0
    detections: int = 0
    cpu: float = 0.0
    warm_ups: int = 0

    def add(self, predictor: Predictor, images: Sequence[Pixels]) -> None:
        """Runs one batch."""
        cpu = time.process_time()
        seconds, detections = timed(predictor, images)
        self.cpu += time.process_time() - cpu
        for part, value in seconds.items():
            self.seconds[part].append(value)
        self.images += len(images)
        self.detections += detections

    @property
    def median(self) -> float:
        """Seconds of a batch."""
        return float(np.median(self.seconds[SUM]))

    @property
    def cores(self) -> float:
        """CPU cores that were busy on average; a library that waits by spinning keeps one busy, too."""
        return self.cpu / sum(self.seconds[SUM])

    @property
    def images_per_second(self) -> float:
        """Of batches one after the other."""
        return self.images / sum(self.seconds[SUM])

    @property
    def detections_per_image(self) -> float:
        """How many were found on average."""
        return self.detections / self.images


def timed(predictor: Predictor, images: Sequence[Pixels]) -> tuple[dict[str, float], int]:
    """Runs one batch of images of one canvas.

    Returns:
        seconds by `PARTS` and `SUM`, and how many detections there were.
    """
    marks = [time.perf_counter()]
    prepared = [predictor.prepare(image) for image in images]
    canvases = np.stack([image.canvas for image in prepared])
    sizes = np.array([image.size for image in prepared], dtype=np.int32)
    marks.append(time.perf_counter())
    stages: dict[str, float] = {}
    outputs = predictor.stages.run(canvases, sizes, seconds=stages)
    marks.append(time.perf_counter())
    found = predictor.detections(outputs, prepared)
    marks.append(time.perf_counter())
    for detections in found:
        detections.to_rle()
    marks.append(time.perf_counter())
    prepare, run, results, encode = np.diff(marks).tolist()
    seconds = {
        "prepare": prepare,
        **stages,
        "other": max(0.0, run - sum(stages.values())),  # two clocks may differ by less than it is
        "results": results,
        "encode": encode,
        SUM: marks[-1] - marks[0],
    }
    return seconds, sum(map(len, found))


def decoded(images: Iterable[Encoded]) -> Iterator[tuple[Encoded, Pixels]]:
    """Decodes images one after the other; those that cannot be decoded are logged and passed over."""
    for image in images:
        try:
            yield image, decode_image(image)
        except ImageError as error:
            logger.warning("skipped: %s", one_line(error))


def full_batches(
    images: Sequence[Pixels], preprocess: PreprocessConfig, batch: int
) -> list[list[Pixels]]:
    """Batches of `batch` images of one canvas that hold every image, in a seeded order.

    Where a canvas has too few, its images come again, so that all batches are of one size.
    """
    by_canvas: dict[tuple[int, int], list[Pixels]] = {}
    for image in images:
        by_canvas.setdefault(canvas_of(image, preprocess), []).append(image)
    batches = [
        [same[(start + i) % len(same)] for i in range(batch)]
        for same in by_canvas.values()
        for start in range(0, len(same), batch)
    ]
    order = np.random.default_rng(0).permutation(
        len(batches)
    )  # else some runs see one canvas alone
    return [batches[i] for i in order]


def canvas_of(image: Pixels, preprocess: PreprocessConfig) -> tuple[int, int]:
    """(H, W) of the canvas that an image gets."""
    height, width, _ = image.shape
    return padded_shape(resized_shape((height, width), preprocess), preprocess)


def check_batch(predictor: Predictor, batch: int) -> None:
    """Whether the backend takes so many images together.

    Raises:
        ComaskError: it does not; `Predictor.load` was given that many, and runs fewer.
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
        predictor: to warm up.
        batches: see `full_batches`.
        runs: so many instead.

    Returns:
        how many it ran.
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
    """Whether the last two runs were no faster, but for 5 %, than the fastest before them."""
    return len(seconds) > 2 and min(seconds[-2:]) >= STEADY * min(seconds[:-2])


def take_turns(
    predictors: Mapping[str, Predictor],
    batches: Mapping[str, Sequence[Sequence[Pixels]]],
    *,
    runs: int,
    warm_ups: int | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Measured]:
    """Runs one batch on every predictor in turn, so that other load meets all of them alike.

    Args:
        predictors: by name.
        batches: of each, see `full_batches`; they come again where there are fewer than `runs`.
        runs: of each.
        warm_ups: see `warm_up`.
        advance: is called after each turn of all.
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
    """Times batches, as `full_batches` gives them, in a stream.

    One canvas is measured after the other, since a slot's graph is of the last canvas that it ran, and a
    camera has but one.
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
    """Runs a batch in every slot of a session of `SLOTS`: each grows and captures for itself."""
    for _ in range(times):
        list(streamed(session, [list(batch)] * SLOTS))


def _overlapped(session: StreamSession, batches: Sequence[Sequence[Pixels]]) -> float:
    """Seconds that `batches` take while all slots are at work."""
    runs = max(len(batches), 4 * SLOTS)  # else filling and draining the slots is most of it
    started = time.perf_counter()
    list(streamed(session, map(list, islice(cycle(batches), runs))))
    return (time.perf_counter() - started) * len(batches) / runs


def streamed(
    session: StreamSession, batches: Iterable[Pixels | list[Pixels]]
) -> Iterator[tuple[float, int]]:
    """Runs frames or batches in a session of `SLOTS` slots, as many at once.

    Yields:
        for each in turn, the seconds from submission to RLEs, and how many detections there are.
    """
    waiting: deque[tuple[float, Future]] = deque()

    def finish() -> tuple[float, int]:
        started, future = waiting.popleft()
        found = future.result()
        count = sum(len(one.to_rle()) for one in (found if isinstance(found, list) else [found]))
        return time.perf_counter() - started, count

    for batch in batches:
        if len(waiting) == SLOTS:
            yield finish()
        waiting.append((time.perf_counter(), session.submit(batch, rle=True)))
    while waiting:
        yield finish()
