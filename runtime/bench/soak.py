"""One backend under load for as long as is asked for, and what its process takes meanwhile."""

from __future__ import annotations

import contextlib
import io
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comask.config import PreprocessConfig
from comask.errors import ComaskError, ImageError, one_line
from comask.preprocess import Pixels, decode_image
from comask.runtime.bench.memory import free_gpu_memory
from comask.runtime.bench.vitals import (
    MIB,
    Series,
    clock_mhz,
    open_files,
    resident_bytes,
    thread_count,
    waited_seconds,
)
from comask.runtime.gpu import find_gpu
from comask.runtime.predictor import Predictor
from comask.runtime.session import Closing
from comask.runtime.stream import SLOTS, Future

Encoded = Path | bytes  # of an image

SAMPLES = 1000  # at most, whatever the length: a run that kept more would grow by itself
SESSION_ROUNDS = 10  # between streams that are opened for one frame, beside the one that stays open


@dataclass(frozen=True, slots=True)
class Soaked:
    """What a run did.

    Attributes:
        seconds: that it took.
        rounds: through all images.
        images: that were looked at, each twice a round: by a call and in a stream.
        detections: in them.
        unreadable: attempts to read an image that failed.
        times: [N] f64, seconds since the start, of each sample.
        series: [N] f64 each, by the names of `growth.LIMITS`; `waited`, the share of a call's time in
            which other processes had the processor, which latencies are without; and `clock_mhz` where
            it is known.
        problem: what ended it early, or None.
    """

    seconds: float
    rounds: int
    images: int
    detections: int
    unreadable: int
    times: Series
    series: dict[str, Series]
    problem: str | None


def soak(
    predictor: Predictor,
    images: Sequence[Encoded],
    seconds: float,
    *,
    stopped: Callable[[], bool] = lambda: False,
    tell: Callable[[float, str], None] = lambda seconds, note: None,
) -> Soaked:
    """Goes through the images again and again, and samples after whole rounds, which are all alike.

    Args:
        predictor: under load.
        images: files or their content, broken ones among them.
        seconds: to go on for.
        stopped: whether to end after the image in hand.
        tell: is given seconds since the start and a few words, after each sample.
    """
    load, problem = _Load(predictor, images, stopped), None
    started = time.perf_counter()
    now = last = 0.0
    kept = np.full((0, 0), np.nan)
    names: list[str] = []
    count = 0
    try:
        with load:
            while now < seconds and not stopped():
                load.round()
                now = time.perf_counter() - started
                if stopped() or now - last < seconds / SAMPLES:
                    continue
                values = load.sample()
                if not names:  # memory for all samples, before there is anything to compare
                    names, kept = list(values), np.full((SAMPLES + 2, len(values) + 1), np.nan)
                kept[count], count, last = (now, *values.values()), count + 1, now
                tell(now, _in_words(values))
    # what a leak ends with, too: no memory, no files, no threads
    except (ComaskError, OSError, MemoryError, RuntimeError) as error:
        problem = one_line(error) or type(error).__name__
    return Soaked(
        seconds=time.perf_counter() - started,
        rounds=load.rounds,
        images=load.images,
        detections=load.detections,
        unreadable=load.unreadable,
        times=kept[:count, 0] if names else np.empty(0),
        series={name: kept[:count, i] for i, name in enumerate(names, 1)},
        problem=problem,
    )


class _Load(Closing):
    """What a program does with a predictor all day.

    Args:
        predictor: under load.
        images: of a round.
        stopped: whether to end within a round.
    """

    def __init__(
        self, predictor: Predictor, images: Sequence[Encoded], stopped: Callable[[], bool]
    ) -> None:
        batch = predictor.max_batch
        self._predictor, self._images, self._stopped = predictor, images, stopped
        self._groups = [images[i : i + batch] for i in range(0, len(images), batch)]
        kind, _, index = predictor.stages.device.partition(":")
        self._gpu = int(index or 0) if kind == "cuda" else None
        gpu = None if self._gpu is None else find_gpu(self._gpu)
        self._gpu_memory = gpu.memory if gpu else 0
        self._stream = predictor.stream()
        self.rounds = self.images = self.detections = self.unreadable = 0
        self._calls: list[float] = []  # seconds, since the last sample
        self._frames: list[float] = []
        self._waited = 0.0  # seconds of `_calls` in which others had the processor
        self._last = time.process_time(), 0, 0, 0  # CPU seconds, images, unreadable, rounds

    def round(self) -> None:
        """Every image by a call, from its file to RLEs, and then as a frame of a stream."""
        for group in self._groups:
            started, waited = time.perf_counter(), waited_seconds()
            pixels = list(self._readable(group))
            if pixels:
                for found in self._predictor(list(pixels)):
                    self.detections += len(found.to_rle())
                self._calls.append(time.perf_counter() - started)
                self._waited += waited_seconds() - waited
                self.images += len(pixels)
        waiting: deque[tuple[float, Future]] = deque()
        frame: Pixels | None = None
        for frame in self._readable(self._images):
            if len(waiting) == SLOTS:
                self._finish(*waiting.popleft())
            waiting.append((time.perf_counter(), self._stream.submit(frame, rle=True)))
        while waiting:
            self._finish(*waiting.popleft())
        with contextlib.suppress(ImageError):
            self._stream.submit(np.empty((0, 0, 3), np.uint8))
        if self.rounds % SESSION_ROUNDS == 0 and frame is not None:
            with self._predictor.stream() as stream:
                stream.submit(frame, rle=True).result()
        self.rounds += 1

    def sample(self) -> dict[str, float]:
        """What the process takes, and how long the rounds since the last sample took."""
        last, self._last = self._last, (
            time.process_time(), self.images, self.unreadable, self.rounds,
        )  # fmt: skip
        cpu, images, unreadable, rounds = (a - b for a, b in zip(self._last, last, strict=True))
        if not self._calls:
            raise ImageError("no image can be read any more, though one could before")
        # Frames are worked on by another thread, which waits no less.
        waited, self._waited = min(1.0, self._waited / sum(self._calls)), 0.0
        values: dict[str, float | None] = {
            "resident_bytes": resident_bytes(),
            "gpu_bytes": self._gpu_bytes(),
            "threads": thread_count(),
            "files": open_files(),
            "unreadable": unreadable / rounds,
            "cpu_ms": 1000 * cpu / images,
            "waited": waited,
            "clock_mhz": clock_mhz(),
        }
        for name, seconds in (("call", self._calls), ("stream", self._frames)):
            for rank in (50, 99):
                own = (1 - waited) * float(np.percentile(seconds, rank))
                values[f"{name}_p{rank}_ms"] = 1000 * own
            seconds.clear()
        return {name: float(value) for name, value in values.items() if value is not None}

    def close(self) -> None:
        """Closes the stream that was open all the time."""
        self._stream.close()

    def _readable(self, images: Sequence[Encoded]) -> Iterator[Pixels]:
        for image in images:
            if self._stopped():
                return
            try:
                pixels = decode_image(image)
            except ImageError:
                self.unreadable += 1
            else:
                yield pixels

    def _finish(self, started: float, future: Future) -> None:
        found = future.result()
        assert not isinstance(found, list)  # it was a single frame
        self.detections += len(found.to_rle())
        self._frames.append(time.perf_counter() - started)
        self.images += 1

    def _gpu_bytes(self) -> int | None:
        """Memory in use on the predictor's GPU, whoever uses it; None where it runs on none."""
        free = None if self._gpu is None else free_gpu_memory(self._gpu)
        return None if free is None else self._gpu_memory - free


def _in_words(values: dict[str, float]) -> str:
    return (
        f"{values['resident_bytes'] / MIB:.0f} MiB, {values['threads']:.0f} threads, "
        f"{values['files']:.0f} files, p50 {values['call_p50_ms']:.1f} ms"
    )


def noise_images(preprocess: PreprocessConfig) -> list[Encoded]:
    """Seeded noise as JPEG: wide, tall, square and small ones, of odd sizes too."""
    from PIL import Image

    short, long = preprocess.short_side, preprocess.max_side
    sizes = [(short, long), (long, short), (short, short), (short // 2 + 1, long // 2), (33, 47)]
    rng = np.random.default_rng(0)
    encoded: list[Encoded] = []
    for size in sizes:
        content = io.BytesIO()
        noise = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(content, format="JPEG")
        encoded.append(content.getvalue())
    return encoded


def broken_images(sound: bytes) -> list[Encoded]:
    """What is no image, and a half of one."""
    return [b"no image", sound[: len(sound) // 2]]
