"""`VideoPipeline`: decodes, infers and writes in three threads with bounded queues between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

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

LIVE_FRAMES = 2  # frames of a live source that may wait; a longer queue would only add delay
PAUSE = 0.005  # seconds between two checks for results while waiting for frames


class Channel(Generic[Item]):
    """A bounded queue that passes items from one thread to another.

    Every method may be called from a signal handler, since the lock is reentrant.

    Args:
        size: the largest number of items that wait.
        drop_oldest: if `size` items wait, `put` discards the oldest one instead of waiting.
    """

    def __init__(self, size: int, *, drop_oldest: bool = False) -> None:
        self._size, self._drop_oldest = size, drop_oldest
        self._items: deque[Item] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._closed = self._cancelled = False
        self._error: BaseException | None = None
        self.dropped = 0

    def put(self, item: Item) -> bool:
        """Passes `item` on, waiting for room; returns False if the receiver has cancelled."""
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
        """Waits at most `timeout` seconds; returns whether `take(count)` would return at once."""
        with self._changed:
            wanted = min(count, self._size)
            return self._changed.wait_for(
                lambda: len(self._items) >= wanted or self._closed, timeout
            )

    def take(self, count: int = 1) -> list[Item]:
        """Returns the next `count` items, waiting for them; fewer at the end, and none after it.

        Raises:
            BaseException: the error that was passed to `close`, after the last item.
        """
        with self._changed:
            self.ready(count)
            taken = [self._items.popleft() for _ in range(min(count, len(self._items)))]
            self._changed.notify_all()
            if not taken and self._error is not None:
                raise self._error
            return taken

    def close(self, error: BaseException | None = None) -> None:
        """Ends the sender's side. Waiting items can still be taken; after them, `take` raises `error`."""
        with self._changed:
            self._closed = True
            self._error = self._error or error
            self._changed.notify_all()

    def cancel(self) -> None:
        """Ends the receiver's side. Waiting items are discarded, and `put` returns False from now on."""
        with self._changed:
            self._closed = self._cancelled = True
            self._items.clear()
            self._changed.notify_all()


class Inference(Closing):
    """Runs the frames of one video through the network. Not thread-safe.

    `submit` does not wait for results. Without a GPU, another thread runs the batches one by one.

    Args:
        predictor: the predictor that runs the frames.
        depth: the number of `submit` calls whose results may be outstanding at once.
        rle: whether RLEs are wanted. A GPU then computes them with the results; without a GPU they are
            computed where they are first asked for.
    """

    def __init__(self, predictor: Predictor, depth: int, *, rle: bool = False) -> None:
        self._predictor, self._depth = predictor, depth
        self._session = predictor.stream(slots=depth)
        # Without a GPU, RLEs would be computed in the inference thread and slow it down.
        self._rle = rle and predictor.stages.gpu is not None
        # For each call: its frames, each with its batch's future and its place in that batch.
        self._submitted: deque[list[tuple[SourceFrame, Future, int]]] = deque()

    def submit(self, frames: Sequence[SourceFrame]) -> None:
        """Starts to run frames, in the same batches as a call of the predictor."""
        started: dict[int, tuple[SourceFrame, Future, int]] = {}
        for indices in batches(map(self._kind, frames), self._predictor.max_batch):
            future = self._start([frames[i] for i in indices])
            started |= {i: (frames[i], future, place) for place, i in enumerate(indices)}
        self._submitted.append([started[i] for i in range(len(frames))])

    @property
    def at_work(self) -> bool:
        """Whether results are outstanding."""
        return bool(self._submitted)

    def results(self, *, last: bool = False) -> Iterator[tuple[SourceFrame, Detections]]:
        """Yields frames with their detections in order, of all finished `submit` calls.

        Waits until at most `depth` - 1 calls are outstanding.

        Args:
            last: whether to wait for all calls.
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
        """Returns a key that is equal for frames that can share a batch."""
        preprocess, picture = self._predictor.preprocess, frame.picture
        canvas = padded_shape(resized_shape(frame.size, preprocess), preprocess)
        if isinstance(picture, Nv12Picture):
            return canvas, picture.matrix, picture.full_range
        return canvas

    def _start(self, frames: Sequence[SourceFrame]) -> Future:
        """Starts to run frames of one kind."""
        pictures = [frame.picture for frame in frames]
        nv12 = [picture for picture in pictures if isinstance(picture, Nv12Picture)]
        if not nv12:
            return self._session.submit(pictures, rle=self._rle)
        return self._session.submit(
            [picture.planes for picture in nv12],
            # Backends of the CPU do not wait for a stream; they raise an error for a GPU's frames.
            stream=None if self._predictor.stages.gpu is None else FFMPEG_STREAM,
            format="nv12",
            matrix=nv12[0].matrix,
            full_range=nv12[0].full_range,
            rle=self._rle,
        )

    def close(self) -> None:
        """Waits for running batches and frees the session."""
        self._session.close()


class Sink(Protocol):
    """A receiver of results: `OverlayWriter`, `JsonLines`, or a class of your own.

    A sink that reads the detections' RLEs may set `wants_rle = True`: a GPU then computes them right
    after the network.
    """

    def add(
        self, frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
    ) -> None:
        """Receives one frame with its detections; called in order.

        `track_ids` are [N] i64 with -1 for an instance without a track, or None without a tracker.
        """


@dataclass(frozen=True, slots=True)
class VideoReport:
    """A report on a pipeline's run.

    Attributes:
        frames: the number of frames with results.
        detections: the number of instances in them.
        dropped: the number of a live source's frames that were dropped because inference was slower.
        damaged: the number of packets and frames that could not be decoded completely.
        reconnects: the number of times that a lost source was connected again.
        seconds: the duration of the run.
        left_out: descriptions of the tracks that the overlay leaves out.
        problem: why the frames ended before the video did, or None.
        decoded_on: `gpu` or `cpu`, where the frames were decoded.
        detour: why frames were in the host's memory on their way to the GPU, see `VideoSource.detour`.
    """

    frames: int
    detections: int
    dropped: int
    damaged: int
    reconnects: int
    seconds: float
    left_out: tuple[str, ...]
    problem: str | None
    decoded_on: Literal["cpu", "gpu"]
    detour: str | None


class VideoPipeline:
    """Runs a predictor over a source and passes the results to sinks.

    One thread decodes, the calling thread infers, and a third one writes. At most `batch` frames wait
    between two threads, and a GPU works on up to three times as many, so memory does not grow with the
    video. A file is read as fast as the slowest thread allows. The frames of a live source run one at a
    time, and the oldest waiting frames are dropped.

    Args:
        predictor: the predictor that runs the frames.
        source: the source of the frames; closed at the end.
        sinks: the receivers of the results, called in the writing thread; the caller closes them.
        batch: the number of a file's frames that run together.
        tracker: assigns ids to instances, if given.
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
        """The number of frames dropped so far."""
        return self._frames.dropped

    def stop(self) -> None:
        """Ends `run` after the current frames; may be called from any thread or signal handler."""
        self._source.stop()
        self._frames.cancel()

    def run(self) -> VideoReport:
        """Runs every frame, and returns when all results are written.

        Raises:
            Exception: any exception of a sink or the predictor.
        """
        started = time.perf_counter()
        # A daemon thread that waits for a stream would call into Python after the interpreter has ended.
        # One that waits for a camera does not, but as a normal thread it could block the exit for ever.
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
        """Returns what was done so far; after `run` raised, what was done until then."""
        return VideoReport(
            frames=self.frames,
            detections=self.detections,
            dropped=self.dropped,
            damaged=self._source.damaged,
            reconnects=self._source.reconnects,
            seconds=self._seconds,
            left_out=tuple(self._source.left_out),
            problem=self._source.problem,
            decoded_on=self._source.decoded_on,
            detour=self._source.detour,
        )

    def _infer(self) -> None:
        rle = any(getattr(sink, "wants_rle", False) for sink in self._sinks)
        with Inference(self._predictor, self._depth, rle=rle) as inference:
            try:
                while frames := self._take(inference):
                    inference.submit(frames)
                    self._hand_on(inference.results())
            except Exception:
                with contextlib.suppress(Exception):  # The first error is the one to report.
                    self._hand_on(inference.results(last=True))
                raise
            self._hand_on(inference.results(last=True))

    def _take(self, inference: Inference) -> list[SourceFrame]:
        """Returns the next frames; passes on results that arrive while it waits for them."""
        while inference.at_work and not self._frames.ready(self._batch, PAUSE):
            self._hand_on(inference.results())
        return self._frames.take(self._batch)

    def _hand_on(self, results: Iterator[tuple[SourceFrame, Detections]]) -> None:
        for frame, found in results:
            ids = self._tracker.update(found, frame.time) if self._tracker else None
            self._found.put((frame, found, ids))

    def _read(self) -> None:
        try:
            # Closed here because the caller does not wait for a stream that has stalled.
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
