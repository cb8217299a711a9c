"""`VideoPipeline`: decoding, inference and writing side by side, with bounded queues between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from comask.runtime.predictor import Predictor
from comask.runtime.stream import SLOTS
from comask.runtime.video.address import is_camera
from comask.runtime.video.channel import Channel
from comask.runtime.video.inference import Inference
from comask.runtime.video.source import SourceFrame, VideoSource
from comask.runtime.video.track import Tracker
from comask.structures import Detections

LIVE_FRAMES = 2  # of a live source that wait; more would only be older
PAUSE = 0.005  # seconds between looks at a GPU's results while frames are awaited


class Sink(Protocol):
    """What takes results: `OverlayWriter`, `JsonLines`, or a class of yours.

    One that asks for the detections' RLEs may say so by `wants_rle = True`: a GPU then finds them behind
    the network.
    """

    def add(
        self, frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
    ) -> None:
        """One frame, in order; `track_ids` [N] i64, -1 for none, or None where nothing is tracked."""


@dataclass(frozen=True, slots=True)
class VideoReport:
    """What a pipeline did.

    Attributes:
        frames: frames with results.
        detections: instances in them.
        dropped: frames of a live source that came faster than they could be looked at.
        damaged: packets and frames that could not be decoded whole.
        reconnects: how often a lost source was found again.
        seconds: that it took.
        left_out: tracks of the video that its overlay is without, in words.
        problem: why the frames ended before the video did, or None.
    """

    frames: int
    detections: int
    dropped: int
    damaged: int
    reconnects: int
    seconds: float
    left_out: tuple[str, ...]
    problem: str | None


class VideoPipeline:
    """Runs a predictor over a source and hands the results to sinks.

    One thread decodes, the calling one infers, a third writes. Between them wait `batch` frames at
    most, and a GPU has three times as many at work, so memory does not grow with the video. A file waits
    for the slowest of them; of a live source the newest frames are looked at, one at a time, and the
    oldest ones that wait are dropped.

    Args:
        predictor: that looks at the frames.
        source: that gives them; closed at the end.
        sinks: that take the results, in the writing thread; the caller closes them.
        batch: frames of a file that run together.
        tracker: that gives instances their ids, if any.
    """

    def __init__(
        self,
        predictor: Predictor,
        source: VideoSource,
        sinks: Sequence[Sink],
        *,
        batch: int = 1,
        tracker: Tracker | None = None,
    ) -> None:
        self._predictor, self._source, self._sinks = predictor, source, sinks
        self._tracker = tracker
        self._batch = 1 if source.live else batch
        self._depth = 1 if source.live else SLOTS
        size = LIVE_FRAMES if source.live else self._batch
        self._frames = Channel[SourceFrame](size, drop_oldest=source.live)
        self._found = Channel[tuple[SourceFrame, Detections, NDArray[np.int64] | None]](self._batch)
        self._write_error: BaseException | None = None
        self.frames = self.detections = 0
        self._seconds = 0.0

    @property
    def dropped(self) -> int:
        """Frames dropped so far."""
        return self._frames.dropped

    def stop(self) -> None:
        """Ends `run` after the frames it is at; may be called from any thread or signal handler."""
        self._source.stop()
        self._frames.cancel()

    def run(self) -> VideoReport:
        """Looks at every frame; returns when all results are written.

        Raises:
            Exception: what a sink or the predictor raised.
        """
        started = time.perf_counter()
        # A daemon that waits for a stream would call into a Python that has ended. One that waits for a
        # camera does not, and might keep the process for ever.
        camera = is_camera(self._source.name)
        reader = threading.Thread(target=self._read, name="decode", daemon=camera)
        writer = threading.Thread(target=self._write, name="write", daemon=True)
        reader.start()
        writer.start()
        try:
            self._infer()
        finally:
            self.stop()
            self._found.close()
            writer.join()
            self._seconds = time.perf_counter() - started
        if self._write_error is not None:
            raise self._write_error
        return self.report()

    def report(self) -> VideoReport:
        """What was done; also after `run` raised, of the frames before that."""
        return VideoReport(
            frames=self.frames,
            detections=self.detections,
            dropped=self.dropped,
            damaged=self._source.damaged,
            reconnects=self._source.reconnects,
            seconds=self._seconds,
            left_out=tuple(self._source.left_out),
            problem=self._source.problem,
        )

    def _infer(self) -> None:
        rle = any(getattr(sink, "wants_rle", False) for sink in self._sinks)
        with Inference(self._predictor, self._depth, rle=rle) as inference:
            try:
                while frames := self._take(inference):
                    inference.submit(frames)
                    self._hand_on(inference.results())
            except Exception:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    self._hand_on(inference.results(last=True))
                raise
            self._hand_on(inference.results(last=True))

    def _take(self, inference: Inference) -> list[SourceFrame]:
        """The next frames; results that come while they are awaited are handed on."""
        while inference.at_work and not self._frames.ready(self._batch, PAUSE):
            self._hand_on(inference.results())
        return self._frames.take(self._batch)

    def _hand_on(self, results: Iterator[tuple[SourceFrame, Detections]]) -> None:
        for frame, found in results:
            ids = self._tracker.update(found, frame.time) if self._tracker else None
            self._found.put((frame, found, ids))

    def _read(self) -> None:
        try:
            # Closed here and not by the caller, who does not wait for a stream that has stalled.
            with self._source:
                for frame in self._source:
                    if not self._frames.put(frame):
                        break
            self._frames.close()
        except BaseException as error:
            self._frames.close(error)

    def _write(self) -> None:
        try:
            while item := self._found.take():
                frame, found, ids = item[0]
                for sink in self._sinks:
                    sink.add(frame, found, ids)
                self.frames += 1
                self.detections += len(found)
        except BaseException as error:
            self._write_error = error
            self._found.cancel()
            self.stop()
