"""`VideoPipeline`: decoding, inference and writing side by side, with bounded queues between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from comask.preprocess import padded_shape, resized_shape
from comask.runtime.backends.base import Closing
from comask.runtime.images import batches
from comask.runtime.predictor import Predictor
from comask.runtime.stream import SLOTS, Future
from comask.runtime.video.container import is_camera
from comask.runtime.video.hardware import FFMPEG_STREAM, Nv12Picture
from comask.runtime.video.source import SourceFrame, VideoSource
from comask.runtime.video.track import Tracker
from comask.structures import Detections

Item = TypeVar("Item")

LIVE_FRAMES = 2  # of a live source that wait; more would only be older
PAUSE = 0.005  # seconds between looks at a GPU's results while frames are awaited


class Channel(Generic[Item]):
    """Hands items from one thread to another.

    Every method may be called from a signal handler: the lock is one that its own thread may take again.

    Args:
        size: items that wait at most.
        drop_oldest: when `size` items wait, `put` discards the oldest instead of waiting.
    """

    def __init__(self, size: int, *, drop_oldest: bool = False) -> None:
        self._size, self._drop_oldest = size, drop_oldest
        self._items: deque[Item] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._closed = self._cancelled = False
        self._error: BaseException | None = None
        self.dropped = 0

    def put(self, item: Item) -> bool:
        """Hands over `item`, waiting for room; False when the receiver wants no more."""
        with self._changed:
            while len(self._items) >= self._size and not self._cancelled:
                if self._drop_oldest:
                    self._items.popleft()
                    self.dropped += 1
                else:
                    self._changed.wait()
            if self._cancelled:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def ready(self, count: int = 1, timeout: float | None = None) -> bool:
        """Whether `take` returns at once, waiting for that at most `timeout` seconds."""
        with self._changed:
            wanted = min(count, self._size)
            return self._changed.wait_for(
                lambda: len(self._items) >= wanted or self._closed, timeout
            )

    def take(self, count: int = 1) -> list[Item]:
        """The next `count` items, waiting for them; fewer at the end, and none after it.

        Raises:
            BaseException: what `close` was given, after the last item.
        """
        with self._changed:
            self.ready(count)
            taken = [self._items.popleft() for _ in range(min(count, len(self._items)))]
            self._changed.notify_all()
            if not taken and self._error is not None:
                raise self._error
            return taken

    def close(self, error: BaseException | None = None) -> None:
        """The sender's end: no item follows. What waits is still taken, then `error` is raised."""
        with self._changed:
            self._closed = True
            self._error = self._error or error
            self._changed.notify_all()

    def cancel(self) -> None:
        """The receiver's end: what waits is discarded, and `put` returns False from now on."""
        with self._changed:
            self._closed = self._cancelled = True
            self._items.clear()
            self._changed.notify_all()


class Inference(Closing):
    """Frames of one video on their way through the network; one thread at a time.

    `submit` waits for no result; on the host batches run one after the other, in another thread.

    Args:
        predictor: whose network it is.
        depth: calls of `submit` whose results may be on their way at once.
        rle: whether somebody wants RLEs, which the GPU then finds; on the host whoever wants them does.
    """

    def __init__(self, predictor: Predictor, depth: int, *, rle: bool = False) -> None:
        self._predictor, self._depth = predictor, depth
        self._session = predictor.stream(slots=depth)
        # on the host they would be found in the thread that infers, and hold it up
        self._rle = rle and predictor.stages.gpu is not None
        # of each call the frames, each with the future of its batch and its place in that
        self._submitted: deque[list[tuple[SourceFrame, Future, int]]] = deque()

    def submit(self, frames: Sequence[SourceFrame]) -> None:
        """Runs frames, together those that can: as a call of the predictor would."""
        found: dict[int, tuple[SourceFrame, Future, int]] = {}
        for indices in batches(map(self._kind, frames), self._predictor.max_batch):
            future = self._start([frames[i] for i in indices])
            found |= {i: (frames[i], future, place) for place, i in enumerate(indices)}
        self._submitted.append([found[i] for i in range(len(frames))])

    @property
    def at_work(self) -> bool:
        """Whether results are still to come."""
        return bool(self._submitted)

    def results(self, *, last: bool = False) -> Iterator[tuple[SourceFrame, Detections]]:
        """Frames with their detections, in order: those that are done, and all but `depth` - 1 calls'.

        Args:
            last: wait for all.
        """
        while self._submitted:
            frames = self._submitted[0]
            full = len(self._submitted) >= self._depth
            if not (last or full or all(future.done() for _, future, _ in frames)):
                return
            self._submitted.popleft()
            for frame, future, place in frames:
                yield frame, future.result()[place]

    def _kind(self, frame: SourceFrame) -> Hashable:
        """What is equal for frames of a batch."""
        preprocess, picture = self._predictor.preprocess, frame.picture
        canvas = padded_shape(resized_shape(frame.size, preprocess), preprocess)
        if isinstance(picture, Nv12Picture):
            return canvas, picture.matrix, picture.full_range
        return canvas

    def _start(self, frames: Sequence[SourceFrame]) -> Future:
        """Runs frames of one kind."""
        pictures = [frame.picture for frame in frames]
        nv12 = [picture for picture in pictures if isinstance(picture, Nv12Picture)]
        if not nv12:
            return self._session.submit(pictures, rle=self._rle)
        return self._session.submit(
            [picture.planes for picture in nv12],
            # the processor's backends wait for no stream, and refuse frames of a GPU
            stream=None if self._predictor.stages.gpu is None else FFMPEG_STREAM,
            format="nv12",
            matrix=nv12[0].matrix,
            full_range=nv12[0].full_range,
            rle=self._rle,
        )

    def close(self) -> None:
        """Waits for what runs and frees the session."""
        self._session.close()


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
