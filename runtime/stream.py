"""`StreamSession`: frames of video in, futures out, in order with the CUDA stream of the caller."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Literal, TypeAlias

from comask.config import require_count
from comask.errors import ConfigError, FrameDroppedError, ImageError, QueueFullError
from comask.kernels.launch_frames import Matrix
from comask.runtime.dlpack import SharedArray, stream_handle
from comask.runtime.frames import Format
from comask.runtime.lanes import Batch, Fetched, Lane, Loan
from comask.runtime.session import Closing, FramePredictor
from comask.structures import Detections

WhenFull: TypeAlias = Literal["block", "raise", "drop_oldest"]
WHEN_FULL = ("block", "raise", "drop_oldest")
SLOTS = 3  # batches at once where nothing is said: one comes in, one is at work, one goes out


class StreamSession(Closing):
    """Runs frames as they come; made by `Predictor.stream`, closed by `with`, or else with its predictor.

    Threads may share it. Each slot runs a batch; when that is complete, its results are kept on the host
    for their future, and the slot is used again. A session is full while all slots run.

    Args:
        predictor: whose frames they are.
        cuda_stream: of the caller, where `submit` is given none.
        when_full: `block` until a slot is free; `raise` QueueFullError; `drop_oldest`: one frame waits
            for a slot, and a newer one takes its place.
        timeout: seconds that `block` takes at most, then QueueFullError; None for no limit.
        slots, graphs: see `Predictor.stream`.

    Raises:
        ConfigError: an option that there is not, or that goes with no other one.
        EngineError: there is no memory for the slots.
        KernelError: the kernel for frames cannot be compiled for the GPU.
    """

    def __init__(
        self,
        predictor: FramePredictor,
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

        Nothing is copied to the host, and only the GPU waits. The session holds a frame until it has read
        it and is used again. Until then only work on a stream that `Future.wait_read` or `wait_on` was
        called for may write it. A frame in the host's memory is read at once, unless it waits for a slot.

        Args:
            frames: u8 [h, w, 3] or [3, h, w] with `__dlpack__` or `__cuda_array_interface__`, or a numpy
                array; for NV12 [3/2·h, w], Y with UV below, or a tuple of Y [h, w] and UV [h/2, w/2, 2],
                rows of any pitch. Or a list.
            stream: that the frames are written on: a handle, an object with `__cuda_stream__`, or a
                torch or cupy stream; None for the session's, else for what the producer says.
            format: of the frames.
            matrix: of NV12's colours.
            full_range: whether NV12's Y, U and V use 0..255.
            rle: whether the results come with COCO's RLEs; a GPU finds the edges of masks.

        Raises:
            ImageError: frames that are none, need different canvases, or lie where the backend cannot
                read them; a stream, where the backend waits for none.
            QueueFullError: see `when_full`.
            EngineError: frames outside the engines' profile, no memory, or a `stream` that is none.
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
            if self._closed:
                raise RuntimeError("this session is closed")
            borrowed = [
                self._lanes.borrow(source, handle, format, matrix, full_range) for source in sources
            ]
            own = self.predictor.preprocess, self.predictor.mask_threshold
            batch = Batch(tuple(borrowed), *own, rle)
            future = Future(self, batch, single=single)
            if self._when_full == "drop_oldest":
                self._queue(future)
            else:
                self._start(future, self._free_lane(batch))
        return future

    # The methods below expect the caller to hold the lock.

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
            if self._closed:
                raise RuntimeError("this session is closed")
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

    # The methods below acquire the lock themselves.

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


class Future:
    """What becomes of one `submit`; its methods may be called from any thread."""

    def __init__(self, session: StreamSession, batch: Batch, *, single: bool) -> None:
        self._session, self._batch, self._single = session, batch, single
        self._lane: Lane | None = None  # while it runs
        self._loan: Loan | None = None
        self._fetched: Fetched | None = None
        self._error: Exception | None = None
        self._detections: Detections | list[Detections] | None = None

    @property
    def _settled(self) -> bool:
        return self._fetched is not None or self._error is not None

    def done(self) -> bool:
        """Whether `result` would return, or raise, without waiting."""
        with self._session._changed:
            self._session._start_waiting()
            return self._settled or (self._lane is not None and self._lane.past())

    def result(self, timeout: float | None = None) -> Any:
        """The detections, brought to the host when first asked for.

        Args:
            timeout: seconds to wait at most.

        Returns:
            `Detections`, or a list of them where a list was submitted.

        Raises:
            TimeoutError: it takes longer.
            FrameDroppedError: a newer frame took its place.
            EngineError: the GPU failed.
        """
        self._session._settle(self, timeout)
        if self._error is not None:
            raise self._error
        if self._detections is None:
            assert self._fetched is not None
            found = self._session.predictor.detections(self._fetched.outputs, self._batch.places())
            if self._batch.rle:
                found = self._fetched.with_rles(found)
            self._detections = found[0] if self._single else found
        return self._detections

    @property
    def outputs(self) -> dict[str, SharedArray]:
        """Stage 2's outputs by name where the backend wrote them; a consumer's stream waits for them.

        `num_detections` [B], `boxes` [B, D, 4] `xyxy` in pixels of the resized frame, `scores` [B, D],
        `labels` [B, D], `masks` [B, D, 28, 28]. On the host this waits for them, and they stay.

        On a GPU nothing waits, and they are borrowed until the slot is used again, which any use of the
        session may do once they are complete; `copy` waits for them and keeps them. What a consumer
        queued by then, on the stream that it gave to `__dlpack__` or that was given to `wait_on`, still
        reads these values: the slot's next batch comes behind it, so the stream must live until then.
        `__cuda_array_interface__` does not say who reads: call `wait_on` with the stream that does.

        Raises:
            RuntimeError: the frame waits for a slot.
            FrameDroppedError: a newer frame took its place.
        """
        return self._borrowed().outputs()

    def bitmaps(self, place: int = 0) -> SharedArray:
        """Masks of one frame in its own pixels, where the outputs are and borrowed as they are.

        On a GPU nothing waits: the pasting is queued behind the network, and how many masks there are is
        known there alone. They are those of `Detections.masks`.

        Args:
            place: of the frame, where a list was submitted.

        Returns:
            u8 [D, h, w], 1 inside of a mask; zeros from `num_detections` on.

        Raises:
            IndexError: there is no such frame.
            RuntimeError: the frame waits for a slot, or the outputs' slot is in use again.
            FrameDroppedError: a newer frame took its place.
            EngineError: there is no memory for them.
        """
        if not 0 <= place < len(self._batch.frames):
            raise IndexError(f"no frame {place} in a batch of {len(self._batch.frames)}")
        return self._borrowed().bitmaps(place)

    def _borrowed(self) -> Loan:
        with self._session._changed:
            if self._error is not None:
                raise self._error
            if self._loan is None:
                raise RuntimeError("this frame waits for a slot: it has no outputs before result()")
            return self._loan

    def wait_on(self, stream: Any) -> None:
        """Later work on the caller's stream starts after this batch; only on the host the caller waits.

        Args:
            stream: see `StreamSession.submit`.

        Raises:
            RuntimeError: the frame waits for a slot.
            EngineError: the stream is none.
        """
        if (loan := self._begun()) is not None:
            loan.wait_on(stream_handle(stream))

    def wait_read(self, stream: Any) -> None:
        """Later work on the caller's stream starts after the frames were read, and may overwrite them.

        Args:
            stream: see `StreamSession.submit`.

        Raises:
            RuntimeError: the frame waits for a slot.
            EngineError: the stream is none.
        """
        if (loan := self._begun()) is not None:
            loan.wait_read(stream_handle(stream))

    def _begun(self) -> Loan | None:
        """None for what will never run."""
        with self._session._changed:
            if self._loan is None and not self._settled:
                raise RuntimeError("this frame waits for a slot: there is nothing to wait on yet")
            return self._loan
