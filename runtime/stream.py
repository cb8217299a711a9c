"""`StreamSession`: frames of video in, futures out, in order with the CUDA stream of the caller."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Literal, TypeAlias

from comask.config import require_count
from comask.errors import ConfigError, FrameDroppedError, ImageError, QueueFullError
from comask.kernels.launch import Matrix
from comask.runtime.backends.base import Closing, FramePredictor
from comask.runtime.dlpack import SharedArray, stream_handle
from comask.runtime.frames import Coding, Format
from comask.runtime.lanes import Batch, Lane
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
        self._idle = list(self._lanes.lanes)  # the longest idle first
        self._running: deque[Batch] = deque()  # the oldest first
        self._waiting: Batch | None = None
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
        coding = Coding(format, matrix, full_range)
        with self._changed:
            if self._closed:
                raise RuntimeError("this session is closed")
            borrowed = tuple(self._lanes.borrow(source, handle, coding) for source in sources)
            own = self.predictor.preprocess, self.predictor.mask_threshold
            batch = Batch(borrowed, *own, rle)
            if self._when_full == "drop_oldest":
                self._queue(batch)
            else:
                self._start(batch, self._free_lane(batch))
        return Future(self, batch, single=single)

    # The methods below expect the caller to hold the lock.

    def _queue(self, batch: Batch) -> None:
        self._start_waiting()
        if self._waiting is not None:
            self._waiting.error = FrameDroppedError("a newer frame took the place of this one")
            self._waiting.release()
        self._waiting = batch
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Starts the batch that waits, if a lane is free by now."""
        batch = self._waiting
        lane = self._lane_at_hand(batch) if batch else None
        if batch is None or lane is None:
            return
        self._waiting = None
        try:
            self._start(batch, lane)
        except Exception as error:  # whoever called is another one than whose frame it is
            batch.error = error

    def _start(self, batch: Batch, lane: Lane) -> None:
        try:
            lane.start(batch)
        except BaseException:
            self._idle.append(lane)
            raise
        batch.lane = lane
        self._running.append(batch)

    def _lane_at_hand(self, batch: Batch) -> Lane | None:
        """A lane that has nothing to do, freed of a complete batch where need be.

        Of several one that suits, as graphs are of a lane's last shapes; else the longest idle one.
        """
        for running in self._running:
            assert running.lane is not None
            running.lane.release_read()
        if not self._idle:
            any(self._finish(running) for running in list(self._running))
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

    def _await(self, batch: Batch, end: float | None) -> bool:
        """Waits for a running batch without the lock; False when the time is over.

        Another thread may have finished it by then, and its lane may run another one.
        """
        assert batch.lane is not None
        error = None
        seconds = None if end is None else max(0.0, end - time.monotonic())
        self._waiters += 1
        self._changed.release()
        try:
            done = batch.lane.wait(batch, seconds)
        except Exception as failure:  # for whoever asks for this result
            done, error = True, failure
        finally:
            self._changed.acquire()
            self._waiters -= 1
            self._changed.notify_all()
        if error is not None and not batch.settled:
            batch.error = error
            self._give_back(batch, batch.lane)
        return done

    def _finish(self, batch: Batch) -> bool:
        """Brings a complete batch's outputs to the host, which frees its lane."""
        lane = batch.lane
        if lane is None or batch.settled:
            return batch.settled
        try:
            if not lane.wait(batch, 0):
                return False
            lane.release_read()
            batch.outputs, batch.edges = lane.fetch(batch)
        except Exception as error:  # for whoever asks for this result
            batch.error = error
        self._give_back(batch, lane)
        return True

    def _give_back(self, batch: Batch, lane: Lane) -> None:
        self._running.remove(batch)
        self._idle.append(lane)

    # The methods below acquire the lock themselves.

    def done(self, batch: Batch) -> bool:
        """See `Future.done`."""
        with self._changed:
            self._start_waiting()
            return batch.settled or (batch.lane is not None and batch.lane.wait(batch, 0))

    def settle(self, batch: Batch, timeout: float | None) -> None:
        """Returns when a batch has come to its end; raises TimeoutError after so many seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._finish(batch):
                self._start_waiting()
                if batch.settled:
                    return
                # a batch that waits for a slot waits for the oldest one first
                done = self._await(batch if batch.lane else self._running[0], end)
                if not done and not self._finish(batch):
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
                    for batch in list(self._running):
                        self._finish(batch)
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
        self._detections: Detections | list[Detections] | None = None

    def done(self) -> bool:
        """Whether `result` would return, or raise, without waiting."""
        return self._session.done(self._batch)

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
        batch = self._batch
        self._session.settle(batch, timeout)
        if batch.error is not None:
            raise batch.error
        if self._detections is None:
            assert batch.outputs is not None
            found = self._session.predictor.detections(batch.outputs, batch.placements)
            if batch.rle:
                found = batch.with_rles(found)
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
        return self._lane().outputs(self._batch)

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
        return self._lane().bitmaps(self._batch, place)

    def _lane(self) -> Lane:
        if self._batch.error is not None:
            raise self._batch.error
        if self._batch.lane is None:
            raise RuntimeError("this frame waits for a slot: it has no outputs before result()")
        return self._batch.lane

    def wait_on(self, stream: Any) -> None:
        """Later work on the caller's stream starts after this batch; only on the host the caller waits.

        Args:
            stream: see `StreamSession.submit`.

        Raises:
            RuntimeError: the frame waits for a slot.
            EngineError: the stream is none.
        """
        if (lane := self._begun_lane()) is not None:
            lane.wait_on(self._batch, stream_handle(stream))

    def wait_read(self, stream: Any) -> None:
        """Later work on the caller's stream starts after the frames were read, and may overwrite them.

        Args:
            stream: see `StreamSession.submit`.

        Raises:
            RuntimeError: the frame waits for a slot.
            EngineError: the stream is none.
        """
        if (lane := self._begun_lane()) is not None:
            lane.wait_read(self._batch, stream_handle(stream))

    def _begun_lane(self) -> Lane | None:
        """None for what will never run."""
        lane = self._batch.lane
        if lane is None and not self._batch.settled:
            raise RuntimeError("this frame waits for a slot: there is nothing to wait on yet")
        return lane
