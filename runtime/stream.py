"""`StreamSession`: takes video frames and returns futures, ordered with the caller's CUDA stream."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Any, Literal, TypeAlias, get_args

from typing_extensions import override

from comask.config import require_count
from comask.errors import ConfigError, FrameDroppedError, ImageError, QueueFullError
from comask.kernels.launch import Matrix
from comask.runtime.backends.base import Closing, FramePredictor
from comask.runtime.dlpack import SharedArray, stream_handle
from comask.runtime.frames import Coding, Format
from comask.runtime.lanes import Batch, Lane
from comask.structures import Detections

WhenFull: TypeAlias = Literal["block", "raise", "drop_oldest"]
WHEN_FULL = get_args(WhenFull)
SLOTS = 3  # batches at once by default: one comes in, one runs, one goes out


class StreamSession(Closing):
    """Runs frames as they come; `Predictor.stream` creates it, `with` or its predictor closes it.

    Threads may share a session. Each slot runs one batch. Once the batch is complete, its results are
    kept on the host for its future, and the slot is free again. A session is full while all slots run.

    Args:
        predictor: the predictor that runs the frames.
        cuda_stream: the caller's stream for calls of `submit` without `stream`.
        when_full: `block` until a slot is free; `raise` QueueFullError; `drop_oldest`: one frame waits
            for a slot, and a newer one takes its place.
        timeout: seconds after which `block` raises QueueFullError; None for no limit.
        slots, graphs: see `Predictor.stream`.

    Raises:
        ConfigError: if an option is invalid, or two options contradict each other.
        EngineError: if memory for the slots runs out.
        KernelError: if the kernel for frames cannot be compiled for the GPU.
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
                f"timeout={timeout} with when_full={when_full!r}; expected seconds, and when_full='block'"
            )
        require_count("slots", slots)
        self.predictor, self._cuda_stream = predictor, cuda_stream
        self._when_full, self._timeout = when_full, timeout
        self._changed = threading.Condition(threading.Lock())
        self._lanes = predictor.stages.lanes(slots, graphs=graphs)
        self._idle = list(self._lanes.lanes)  # the longest idle first
        self._running: deque[Batch] = deque()  # the oldest first
        self._waiting: Batch | None = None
        self._waiters = 0  # threads that wait for a lane without holding the lock
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
        it and a later call of the session notices that. Until then, only work on a stream for which
        `Future.wait_read` or `wait_on` was called may overwrite the frame. A frame in the host's memory
        is read during this call unless it waits for a slot.

        Args:
            frames: u8 [h, w, 3] or [3, h, w] with `__dlpack__` or `__cuda_array_interface__`, or a numpy
                array; for NV12 [3/2·h, w], Y with UV below, or a tuple of Y [h, w] and UV [h/2, w/2, 2],
                rows of any pitch. Or a list of frames.
            stream: the stream that writes the frames: a handle, an object with `__cuda_stream__`, or a
                torch or cupy stream; None for the session's, or if it has none, the producer's.
            format: the format of the frames.
            matrix: the matrix of NV12's colours.
            full_range: whether NV12's Y, U and V use 0..255.
            rle: whether the results get COCO's RLEs; on a GPU, the GPU finds the masks' edges for them.

        Raises:
            ImageError: if frames are invalid, need different canvases, or lie where the backend cannot
                read them; or if `stream` is given to a backend that cannot wait for streams.
            QueueFullError: see `when_full`.
            EngineError: if frames exceed the engines' profile, memory runs out, or `stream` is invalid.
            RuntimeError: if the session is closed.
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
        """Starts the waiting batch if a lane is free by now."""
        batch = self._waiting
        lane = self._lane_at_hand(batch) if batch else None
        if batch is None or lane is None:
            return
        self._waiting = None
        try:
            self._start(batch, lane)
        except Exception as error:  # its own future raises it, and not another frame's caller
            batch.error = error
        except BaseException:
            batch.error = RuntimeError("this frame was interrupted before it ran")
            raise

    def _start(self, batch: Batch, lane: Lane) -> None:
        try:
            lane.start(batch)
        except BaseException:
            self._idle.append(lane)
            raise
        batch.lane = lane
        self._running.append(batch)

    def _lane_at_hand(self, batch: Batch) -> Lane | None:
        """Returns an idle lane, or None; first finishes complete batches if no lane is idle.

        A lane that suits the batch is preferred, since a CUDA graph belongs to a lane's last shapes; the
        longest idle lane comes next.
        """
        for running in self._running:
            assert running.lane is not None
            with contextlib.suppress(Exception):  # its own future raises it
                running.lane.release_read()
        if not self._idle:
            for running in self._running:
                if self._finish(running):
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

    def _await(self, batch: Batch, end: float | None) -> bool:
        """Waits for a running batch without holding the lock; returns False if the time is over.

        Another thread may have finished the batch by then, and its lane may run another one.
        """
        assert batch.lane is not None
        error = None
        seconds = None if end is None else max(0.0, end - time.monotonic())
        self._waiters += 1
        self._changed.release()
        try:
            done = batch.lane.wait(batch, seconds)
        except Exception as failure:  # raised by this batch's future
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
        """Copies a complete batch's outputs to the host and frees its lane; returns whether it did."""
        lane = batch.lane
        if lane is None or batch.settled:
            return batch.settled
        try:
            if not lane.wait(batch, 0):
                return False
            lane.release_read()
            batch.outputs, batch.edges = lane.fetch(batch)
        except Exception as error:  # raised by this batch's future
            batch.error = error
        self._give_back(batch, lane)
        return True

    def _give_back(self, batch: Batch, lane: Lane) -> None:
        self._running.remove(batch)
        self._idle.append(lane)

    # The methods below acquire the lock themselves.

    def done(self, batch: Batch) -> bool:
        """Returns whether the future's `result` would not wait."""
        with self._changed:
            self._start_waiting()
            try:
                return batch.settled or (batch.lane is not None and batch.lane.wait(batch, 0))
            except Exception:  # `result` raises it
                return True

    def settle(self, batch: Batch, timeout: float | None) -> None:
        """Waits until a batch is settled; raises TimeoutError after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._finish(batch):
                self._start_waiting()
                if batch.settled:
                    return
                # a batch that waits for a slot waits for the oldest running batch first
                done = self._await(batch if batch.lane else self._running[0], end)
                if not done and not self._finish(batch):
                    raise TimeoutError(f"no result within {timeout} s")

    @override
    def close(self) -> None:
        """Waits for running batches, keeps their results for the futures, and frees everything else.

        Outputs on the GPU are freed unless they were copied. A second call does nothing.

        Raises:
            EngineError: if the GPU failed, so that nothing can be freed.
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
    """The results of one `submit`; any thread may call its methods."""

    def __init__(self, session: StreamSession, batch: Batch, *, single: bool) -> None:
        self._session, self._batch, self._single = session, batch, single
        self._detections: Detections | list[Detections] | None = None

    def done(self) -> bool:
        """Returns whether `result` would return or raise without waiting."""
        return self._session.done(self._batch)

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the batch and returns its detections, which the first call copies to the host.

        Args:
            timeout: seconds to wait at most; None for no limit.

        Returns:
            `Detections`, or a list of them if a list was submitted.

        Raises:
            TimeoutError: if the batch takes longer.
            FrameDroppedError: if a newer frame took its place.
            EngineError: if the GPU failed.
        """
        batch = self._batch
        self._session.settle(batch, timeout)
        if batch.error is not None:
            raise batch.error
        if self._detections is None:
            assert batch.outputs is not None
            detections = self._session.predictor.detections(batch.outputs, batch.placements)
            if batch.rle:
                detections = batch.with_rles(detections)
            self._detections = detections[0] if self._single else detections
        return self._detections

    @property
    def outputs(self) -> dict[str, SharedArray]:
        """Stage 2's outputs by name, in the memory where the backend wrote them.

        `num_detections` [B], `boxes` [B, D, 4] `xyxy` in pixels of the resized frame, `scores` [B, D],
        `labels` [B, D], `masks` [B, D, 28, 28]. Outputs on the host are waited for here, and stay valid.

        On a GPU, a consumer's stream waits for them, and they are borrowed until the slot is used again,
        which any call of the session may cause once they are complete; `SharedArray.copy` makes a copy
        that lasts. Work that a consumer has queued by then still reads these values if it is on the
        stream that was given to `__dlpack__` or `wait_on`: the slot's next batch waits for that stream,
        which must exist until then. `__cuda_array_interface__` does not tell which stream reads.

        Raises:
            RuntimeError: if the frame still waits for a slot.
            FrameDroppedError: if a newer frame took its place.
        """
        return self._lane().outputs(self._batch)

    def bitmaps(self, place: int = 0) -> SharedArray:
        """Returns the masks of one frame in its own pixels, equal to those of `Detections.masks`.

        They lie where the outputs lie, and are borrowed as `outputs` explains. On a GPU this does not
        wait: the masks are pasted behind the network, and only the GPU knows their number.

        Args:
            place: the frame's index, if a list was submitted.

        Returns:
            u8 [D, h, w], 1 inside a mask; zeros from `num_detections` on.

        Raises:
            IndexError: if the batch has no such frame.
            RuntimeError: if the frame still waits for a slot, or the outputs' slot is in use again.
            FrameDroppedError: if a newer frame took its place.
            EngineError: if memory for the masks runs out.
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
        """Makes later work on the caller's stream wait for this batch; on the host, the caller waits.

        Args:
            stream: see `StreamSession.submit`.

        Raises:
            RuntimeError: if the frame still waits for a slot.
            EngineError: if `stream` is invalid.
        """
        if (lane := self._begun_lane()) is not None:
            lane.wait_on(self._batch, stream_handle(stream))

    def wait_read(self, stream: Any) -> None:
        """Like `wait_on`, for the reading of the frames alone: later work may overwrite them."""
        if (lane := self._begun_lane()) is not None:
            lane.wait_read(self._batch, stream_handle(stream))

    def _begun_lane(self) -> Lane | None:
        """Returns the lane that runs or ran the batch; None for a batch that will never run."""
        settled = self._batch.settled  # read first, since a batch has its lane before it is settled
        if (lane := self._batch.lane) is None and not settled:
            raise RuntimeError("this frame waits for a slot: there is nothing to wait on yet")
        return lane
