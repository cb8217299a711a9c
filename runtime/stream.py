"""`StreamSession`: frames of video in, futures out, in order with the caller's CUDA stream."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from comask.runtime.frames import Format
from comask.runtime.future import Future, stream_handle
from comask.runtime.lanes import Batch, Lane, Lanes
from comask.runtime.session import Closing

from comask.errors import ComaskError, ImageError
from comask.kernels.launch_frames import Matrix

if TYPE_CHECKING:
    from comask.runtime.predictor import Predictor

WhenFull: TypeAlias = Literal["block", "raise", "drop_oldest"]
WHEN_FULL = ("block", "raise", "drop_oldest")


class QueueFullError(ComaskError, RuntimeError):
    """All slots of a session are at work."""


class FrameDroppedError(ComaskError, RuntimeError):
    """A newer frame took the place of this one before it was begun."""


class StreamSession(Closing):
    """Runs frames as they come; made by `Predictor.stream`, closed by `with`.

    May be shared by threads. Each slot runs a batch; a slot whose batch is complete is used again, its
    results kept on the host for their future. A session is full while all slots are at work.

    Args:
        predictor: whose frames they are.
        lanes: the slots.
        cuda_stream: of the caller, where `submit` is given none.
        when_full: `block` until a slot is free; `raise` QueueFullError; `drop_oldest`: one frame waits
            for a slot, and a newer one takes its place.
        timeout: seconds that `block` takes at most, then QueueFullError; None for no limit.
    """

    def __init__(
        self,
        predictor: Predictor,
        lanes: Lanes,
        *,
        cuda_stream: Any = None,
        when_full: WhenFull = "block",
        timeout: float | None = None,
    ) -> None:
        if when_full not in WHEN_FULL:
            raise ValueError(f"when_full={when_full!r}; expected one of {', '.join(WHEN_FULL)}")
        self.predictor = predictor
        self._lanes, self._cuda_stream = lanes, cuda_stream
        self._when_full, self._timeout = when_full, timeout
        self._changed = threading.Condition(threading.Lock())
        self._idle = list(lanes.open())
        self._running: deque[Future] = deque()  # the oldest first
        self._waiting: Future | None = None
        self._waiters = 0  # threads that wait for a lane without the lock
        self._closed = False

    def submit(
        self,
        frames: Any,
        *,
        stream: Any = None,
        format: Format = "rgb",
        matrix: Matrix = "bt709",
        full_range: bool = False,
        rle: bool = False,
    ) -> Future:
        """Queues a frame, or a list of frames of one canvas as a batch.

        Nothing is copied to the host, and nothing waits but the GPU. A frame is held until it has been
        read, and let go at the next use of this session; until then it must not be written, unless by
        work on a stream that `Future.wait_on` was called for.

        Args:
            frames: u8 [h, w, 3] or [3, h, w] with `__dlpack__` or `__cuda_array_interface__`, or a numpy
                array; for NV12 [3/2·h, w], Y with UV below, or a tuple of Y [h, w] and UV [h/2, w/2, 2],
                rows of any pitch. Or a list.
            stream: that the frames are written on: a handle, an object with `__cuda_stream__`, or a
                torch or cupy stream; None for the session's, else for what the producer says.
            format: of the frames.
            matrix: of NV12's colours.
            full_range: whether NV12's Y, U and V use 0..255.
            rle: whether the results come with COCO's RLEs, so that `to_rle` and `to_coco` have nothing
                left to find; a GPU finds the edges of masks behind the network.

        Raises:
            ImageError: frames that are none, or need different canvases.
            QueueFullError: see `when_full`.
            EngineError: the frames lie outside the engines' profile, or memory is missing.
            RuntimeError: the session is closed.
        """
        single = not isinstance(frames, list)
        sources = [frames] if single else frames
        if not 1 <= len(sources) <= self.predictor.max_batch:
            raise ImageError(
                f"a batch of {len(sources)} frames; expected 1 to max_batch={self.predictor.max_batch}"
            )
        given = self._cuda_stream if stream is None else stream
        handle = None if given is None else stream_handle(given)
        with self._changed:
            self._check_open()
            borrowed = [
                self._lanes.borrow(source, handle, format, matrix, full_range) for source in sources
            ]
            predictor = self.predictor
            batch = Batch(tuple(borrowed), predictor.preprocess, predictor.mask_threshold, rle)
            batch.canvas  # noqa: B018  # raises where there are several
            future = Future(self, batch, single=single)
            if self._when_full == "drop_oldest":
                self._queue(future)
            else:
                self._start(future, self._free_lane())
        return future

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this session is closed")

    # All below are called with the lock held.

    def _queue(self, future: Future) -> None:
        self._start_waiting()
        if self._waiting is not None:
            self._waiting._error = FrameDroppedError("a newer frame took the place of this one")
            self._waiting._batch.release()
        self._waiting = future
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Starts the frame that waits, if a lane is free by now."""
        future = self._waiting
        lane = self._lane_at_hand() if future else None
        if future is None or lane is None:
            return
        self._waiting = None
        try:
            self._start(future, lane)
        except Exception as error:  # whoever called is another one than whose frame it is
            future._error = error

    def _start(self, future: Future, lane: Lane) -> None:
        try:
            lane.start(future._batch)
        except BaseException:
            self._idle.append(lane)
            raise
        future._lane, future._loan = lane, lane.loan()
        self._running.append(future)

    def _lane_at_hand(self) -> Lane | None:
        """A lane that has nothing to do, freed of a complete batch where need be."""
        for future in self._running:
            assert future._lane is not None
            future._lane.release_read()
        if not self._idle:
            for future in self._running:
                if self._finish(future):
                    break
        return self._idle.pop() if self._idle else None

    def _free_lane(self) -> Lane:
        end = None if self._timeout is None else time.monotonic() + self._timeout
        while (lane := self._lane_at_hand()) is None:
            if self._when_full == "raise" or not self._await(self._running[0], end):
                raise QueueFullError(
                    f"all {len(self._running)} slots are at work; submit less often, or give more slots "
                    "or another when_full"
                )
            self._check_open()
        return lane

    def _await(self, future: Future, end: float | None) -> bool:
        """Waits for a running future without the lock; False when the time is over."""
        lane = future._lane
        assert lane is not None
        seconds = None if end is None else max(0.0, end - time.monotonic())
        self._waiters += 1
        self._changed.release()
        try:
            return lane.wait(seconds)
        finally:
            self._changed.acquire()
            self._waiters -= 1
            self._changed.notify_all()

    def _finish(self, future: Future) -> bool:
        """Brings a complete batch's outputs to the host, which frees its lane."""
        lane = future._lane
        if lane is None:
            return future._settled
        try:
            if not lane.past():
                return False
            lane.release_read()
            future._fetched = lane.fetch()
        except Exception as error:  # for whoever asks for this result
            future._error = error
        future._lane = None
        self._running.remove(future)
        self._idle.append(lane)
        return True

    # And these take it.

    def _advance(self, future: Future) -> bool:
        with self._changed:
            self._start_waiting()
            return future._settled or (future._lane is not None and future._lane.past())

    def _settle(self, future: Future, timeout: float | None) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._finish(future):
                self._start_waiting()
                if future._settled:
                    return
                # a frame that waits for a slot waits for the oldest batch first
                if not self._await(future if future._lane else self._running[0], end):
                    raise TimeoutError(f"no result within {timeout} s")

    def close(self) -> None:
        """Waits for what runs, keeps its results for the futures, and frees everything else.

        Outputs on the GPU are gone then, but for copies. Again is harmless.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._start_waiting()
            while self._running:
                self._await(self._running[0], None)
                for future in list(self._running):
                    self._finish(future)
                self._start_waiting()
            while self._waiters:
                self._changed.wait()
            self._lanes.close()
            self._idle.clear()


__all__ = ["FrameDroppedError", "Future", "QueueFullError", "StreamSession", "stream_handle"]
