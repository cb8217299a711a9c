"""`StreamSession`: frames of video in, futures out, in order with the caller's CUDA stream."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from comask.config import require_count
from comask.errors import ComaskError, ConfigError, ImageError
from comask.kernels.launch_frames import Matrix
from comask.runtime.frames import Format
from comask.runtime.future import Future, stream_handle
from comask.runtime.lanes import Batch, Lane
from comask.runtime.session import Closing

if TYPE_CHECKING:
    from comask.runtime.predictor import Predictor

WhenFull: TypeAlias = Literal["block", "raise", "drop_oldest"]
WHEN_FULL = ("block", "raise", "drop_oldest")
SLOTS = 3  # batches at once where nothing is said: one comes in, one is at work, one goes out


class QueueFullError(ComaskError, RuntimeError):
    """All slots of a session are at work."""


class FrameDroppedError(ComaskError, RuntimeError):
    """A newer frame took the place of this one before it was begun."""


class StreamSession(Closing):
    """Runs frames as they come; made by `Predictor.stream`, closed by `with`, or else with its predictor.

    May be shared by threads. Each slot runs a batch; a slot whose batch is complete is used again, its
    results kept on the host for their future. A session is full while all slots are at work.

    Args:
        predictor: whose frames they are.
        cuda_stream: of the caller, where `submit` is given none.
        when_full: `block` until a slot is free; `raise` QueueFullError; `drop_oldest`: one frame waits
            for a slot, and a newer one takes its place.
        timeout: seconds that `block` takes at most, then QueueFullError; None for no limit.
        slots: see `Predictor.stream`.
        graphs: see `Predictor.stream`.

    Raises:
        ConfigError: an option that there is not, or that goes with no other one.
        EngineError: there is no memory for the slots.
        KernelError: the kernel for frames cannot be compiled for the GPU.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        cuda_stream: Any = None,
        when_full: WhenFull = "block",
        timeout: float | None = None,
        slots: int = SLOTS,
        graphs: bool = True,
    ) -> None:
        if when_full not in WHEN_FULL:
            raise ConfigError(f"when_full={when_full!r}; expected one of {', '.join(WHEN_FULL)}")
        if timeout is not None and (when_full != "block" or timeout < 0):
            raise ConfigError(
                f"timeout={timeout} with when_full={when_full!r}; expected seconds, and 'block'"
            )
        require_count("slots", slots)
        self.predictor, self._cuda_stream = predictor, cuda_stream
        self._when_full, self._timeout = when_full, timeout
        self._changed = threading.Condition(threading.Lock())
        self._lanes = predictor.stages.lanes(slots, graphs=graphs)
        self._idle = list(self._lanes.open())  # the longest idle first
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
        work on a stream that `Future.wait_read` or `wait_on` was called for. A frame in the host's memory
        is read at once, when the stream that it is written on is through, unless it waits for a slot.

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
            ImageError: frames that are none, need different canvases, or lie where the backend cannot
                read them; a stream, where the backend waits for none.
            QueueFullError: see `when_full`.
            EngineError: the frames lie outside the engines' profile, memory is missing, or `stream` is
                none.
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
                self._start(future, self._free_lane(batch))
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
        lane = self._lane_at_hand(future._batch) if future else None
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

    def _lane_at_hand(self, batch: Batch) -> Lane | None:
        """A lane that has nothing to do, freed of a complete batch where need be.

        Of several one that suits, as graphs are of a lane's last shapes; else the longest idle one.
        """
        for future in self._running:
            assert future._lane is not None
            future._lane.release_read()
        if not self._idle:
            for future in self._running:
                if self._finish(future):
                    break
        if not self._idle:
            return None
        lane = next((lane for lane in self._idle if lane.suits(batch)), self._idle[0])
        self._idle.remove(lane)
        return lane

    def _free_lane(self, batch: Batch) -> Lane:
        end = None if self._timeout is None else time.monotonic() + self._timeout
        over = self._when_full == "raise"
        while (lane := self._lane_at_hand(batch)) is None:
            if over:
                raise QueueFullError(
                    f"all {len(self._running)} slots are at work; submit less often, or give more slots "
                    "or another when_full"
                )
            over = not self._await(self._running[0], end)
            self._check_open()
        return lane

    def _await(self, future: Future, end: float | None) -> bool:
        """Waits for a running future without the lock; False when the time is over.

        Another thread may have finished it by then, and its lane may run another batch.
        """
        loan, error = future._loan, None
        assert loan is not None
        seconds = None if end is None else max(0.0, end - time.monotonic())
        self._waiters += 1
        self._changed.release()
        try:
            past = loan.wait(seconds)
        except Exception as failure:  # for whoever asks for this result
            past, error = True, failure
        finally:
            self._changed.acquire()
            self._waiters -= 1
            self._changed.notify_all()
        if error is not None and future._lane is not None:
            future._error = error
            self._give_back(future._lane, future)
        return past

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
        self._give_back(lane, future)
        return True

    def _give_back(self, lane: Lane, future: Future) -> None:
        future._lane = None
        self._running.remove(future)
        self._idle.append(lane)

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
                past = self._await(future if future._lane else self._running[0], end)
                if not past and not self._finish(future):
                    raise TimeoutError(f"no result within {timeout} s")

    def close(self) -> None:
        """Waits for what runs, keeps its results for the futures, and frees everything else.

        Outputs on the GPU are gone then, but for copies. Again is harmless.

        Raises:
            EngineError: the GPU failed, so that nothing can be freed.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            try:
                self._start_waiting()
                while self._running:
                    self._await(self._running[0], None)
                    for future in list(self._running):
                        self._finish(future)
                    self._start_waiting()
                while self._waiters:
                    self._changed.wait()
            finally:
                self._idle.clear()
                self._lanes.close()


__all__ = ["FrameDroppedError", "Future", "QueueFullError", "StreamSession", "stream_handle"]
