"""Runs one backend under load for a given time, and judges whether its process grows."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comask.config import PreprocessConfig
from comask.errors import ComaskError, ImageError, one_line
from comask.preprocess import Pixels, decode_image
from comask.progress import Progress
from comask.runtime.backends import LoadOptions
from comask.runtime.bench.growth import LEAST, PARTS, WARM_UP, Growth, Series, growths, warmed_up
from comask.runtime.bench.machine import (
    MIB,
    Report,
    clock_mhz,
    describe_machine,
    open_files,
    resident_bytes,
    thread_count,
    used_gpu_memory,
    waited_seconds,
)
from comask.runtime.bench.timing import streamed
from comask.runtime.predictor import Predictor

Encoded = Path | bytes  # an image's file, or its content

SAMPLES = 1000  # the most that are kept: a run that kept more the longer it lasts would itself grow
SESSION_ROUNDS = (
    10  # rounds between the streams that are opened for one frame beside the permanent one
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SoakReport(Report):
    """The measurements of a run, and whether something grew.

    Attributes:
        runs_as: backend and precision.
        device: the device that it ran on: `cpu`, `cuda:0`, ….
        subject: the images in words.
        batch: the number of images that ran together.
        proposals: the number of proposals per image; None for the bundle's.
        short_side: shorter side of the resized images in pixels; None for the bundle's.
        minutes: the requested length of the run.
        interrupted: whether it was stopped early, by a signal for example.
        seconds: the length of the run.
        waited: median of the series of that name; None without samples.
        rounds: the number of rounds through all images.
        images: the number of images that were run; each runs twice per round, in a call and in a stream.
        detections: the number of detections in them.
        unreadable: the number of failed attempts to read an image.
        judged: whether the samples were enough to judge.
        passed: whether it was judged, nothing grew beyond its limit, and the run did not break down.
        verdict: the result in one line.
        warm_up_seconds: the length of the warm-up, which is not judged; None without samples.
        growth: the growth of each series, see `growths`.
        times: the seconds from the start to each sample.
        series: the samples by the names of `growth.LIMITS`; `waited`, the share of a call's time in
            which other processes had the processor, which latencies exclude; and `clock_mhz` if it is
            known.
    """

    runs_as: str
    device: str
    subject: str
    batch: int
    proposals: int | None
    short_side: int | None
    minutes: float
    interrupted: bool
    seconds: float
    waited: float | None
    rounds: int
    images: int
    detections: int
    unreadable: int
    judged: bool
    passed: bool
    verdict: str
    warm_up_seconds: float | None
    growth: dict[str, Growth]
    times: list[float]
    series: dict[str, list[float]]


def soak(
    predictor: Predictor,
    images: Sequence[Encoded],
    minutes: float,
    *,
    bundle: Path,
    how: LoadOptions,
    subject: str,
    stopped: Callable[[], bool] = lambda: False,
) -> SoakReport:
    """Runs the images again and again, and takes samples after whole rounds, which are all alike.

    Args:
        predictor: the predictor to put under load.
        images: files or their content, broken ones included.
        minutes: the length of the run.
        bundle: the bundle that the predictor runs.
        how: the options with which the predictor was opened.
        subject: the images in words.
        stopped: returns whether to end the run after the current image.
    """
    machine = describe_machine(how.device)  # before this process causes load
    load, problem, seconds = _Load(predictor, images, stopped), "", 60 * minutes
    total = max(1, round(seconds))
    shown = Progress("soaking", total, unit="seconds")
    started = time.perf_counter()
    now = last = 0.0
    kept = np.empty((0, 1))
    names: list[str] = []
    count = 0
    try:
        with load.stream, shown:
            while now < seconds and not stopped():
                load.round()
                now = time.perf_counter() - started
                if stopped() or now - last < seconds / SAMPLES:
                    continue
                values = load.sample()
                if not names:  # allocates memory for all samples before the first one is compared
                    names, kept = list(values), np.full((SAMPLES + 2, len(values) + 1), np.nan)
                if count == 1:  # the first round is slower
                    _warn_if_short(now - last, seconds)
                kept[count], count, last = (now, *values.values()), count + 1, now
                shown.advance(min(int(now), total) - shown.done, _in_words(values))
    # a leak, too, ends with one of these: no memory, no files, no threads
    except (ComaskError, OSError, MemoryError, RuntimeError) as error:
        problem = one_line(error) or type(error).__name__
    now = time.perf_counter() - started
    times, series = kept[:count, 0], dict(zip(names, kept[:count, 1:].T, strict=True))
    growth = growths(times, series)
    failures = [str(grown) for grown in growth.values() if not grown.passed]
    if problem:
        failures.append(f"the run broke down after {now / 60:.1f} minutes: {problem}")
    return SoakReport(
        bundle=str(bundle), machine=machine, runs_as=predictor.stages.backend,
        device=predictor.stages.device, subject=subject, batch=predictor.max_batch,
        proposals=how.proposals, short_side=how.short_side, minutes=minutes, interrupted=stopped(),
        seconds=now, waited=float(np.median(series["waited"])) if count else None,
        rounds=load.rounds, images=load.images, detections=load.detections,
        unreadable=load.unreadable, judged=bool(growth), passed=bool(growth) and not failures,
        verdict="; ".join(failures) or _verdict(times, now / 60, judged=bool(growth)),
        warm_up_seconds=WARM_UP * float(times[-1]) if count else None, growth=growth,
        times=times.tolist(), series={name: values.tolist() for name, values in series.items()},
    )  # fmt: skip


def _verdict(times: Series, minutes: float, *, judged: bool) -> str:
    """Returns the result, in one line, of a run in which nothing grew and nothing failed."""
    if judged:
        return f"nothing grew beyond its limit in {minutes:.3g} minutes"
    count = int(warmed_up(times).sum())
    return (
        f"too short to judge: {count} samples after the warm-up in {minutes:.2g} minutes, expected "
        f"{LEAST * PARTS}; give {_longer(minutes, max(1, count))}"
    )


class _Load:
    """The load of a program that uses a predictor all day.

    Args:
        predictor: the predictor to put under load.
        images: the images of a round.
        stopped: returns whether to end, even within a round.

    Attributes:
        stream: the stream that is open all the time.
        rounds: a count, as are `images`, `detections` and `unreadable`; see `SoakReport`.
    """

    def __init__(
        self, predictor: Predictor, images: Sequence[Encoded], stopped: Callable[[], bool]
    ) -> None:
        batch = predictor.max_batch
        self._predictor, self._images, self._stopped = predictor, images, stopped
        self._groups = [images[i : i + batch] for i in range(0, len(images), batch)]
        kind, _, index = predictor.stages.device.partition(":")
        self._gpu = int(index or 0) if kind == "cuda" else None
        self.stream = predictor.stream()
        self.rounds = self.images = self.detections = self.unreadable = 0
        self._calls: list[float] = []  # seconds of each call since the last sample
        self._frames: list[float] = []
        self._waited = 0.0  # seconds of `_calls` in which other processes had the processor
        self._last = time.process_time(), 0, 0, 0  # CPU seconds, images, unreadable, rounds

    def round(self) -> None:
        """Runs every image in a call, from its file to RLEs, and then as a frame of a stream."""
        frame: Pixels | None = None
        for group in self._groups:
            started, waited = time.perf_counter(), waited_seconds()
            pixels = list(self._readable(group))
            if pixels:
                for detections in self._predictor(list(pixels)):
                    self.detections += len(detections.to_rle())
                self._calls.append(time.perf_counter() - started)
                self._waited += waited_seconds() - waited
                self.images += len(pixels)
                frame = pixels[-1]
        for seconds, count in streamed(self.stream, self._readable(self._images)):
            self._frames.append(seconds)
            self.detections += count
            self.images += 1
        with contextlib.suppress(ImageError):
            self.stream.submit(np.empty((0, 0, 3), np.uint8))
        if self.rounds % SESSION_ROUNDS == 0 and frame is not None:
            with self._predictor.stream() as stream:
                stream.submit(frame, rle=True).result()
        self.rounds += 1

    def sample(self) -> dict[str, float]:
        """Returns the process's memory, threads and files, and the times since the last sample."""
        last, self._last = self._last, (
            time.process_time(), self.images, self.unreadable, self.rounds,
        )  # fmt: skip
        cpu, images, unreadable, rounds = (a - b for a, b in zip(self._last, last, strict=True))
        if not self._calls:
            raise ImageError("no image can be read any more, although one could before")
        # another thread works on the frames, and waits about as long
        waited, self._waited = min(1.0, self._waited / sum(self._calls)), 0.0
        values: dict[str, float | None] = {
            "resident_bytes": resident_bytes(),
            "gpu_bytes": None if self._gpu is None else used_gpu_memory(self._gpu),
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


def _in_words(values: dict[str, float]) -> str:
    return (
        f"{values['resident_bytes'] / MIB:.0f} MiB, {values['threads']:.0f} threads, "
        f"{values['files']:.0f} files, p50 {values['call_p50_ms']:.1f} ms"
    )


def _warn_if_short(interval: float, total: float) -> None:
    """Logs, after only two rounds, that the samples will be too few to judge.

    Args:
        interval: seconds between two samples.
        total: seconds of the run.
    """
    samples = total * (1 - WARM_UP) / interval
    if samples < LEAST * PARTS:
        logger.warning(
            "warning: a round takes %.2g s, so this run will be too short to judge; give %s",
            interval,
            _longer(total / 60, samples),
        )


def _longer(minutes: float, samples: float) -> str:
    """Returns the option for a run that is long enough, given that `minutes` give too few samples."""
    return f"--minutes {1.2 * minutes * LEAST * PARTS / samples:.2g} or more"


def noise_images(preprocess: PreprocessConfig) -> list[Encoded]:
    """Returns seeded noise as JPEGs: wide, tall, square and small images, some of odd sizes."""
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


def broken_images(sound: Encoded) -> list[Encoded]:
    """Returns bytes that are not an image, and the first half of a valid one."""
    content = sound.read_bytes() if isinstance(sound, Path) else sound
    return [b"no image", content[: len(content) // 2]]
