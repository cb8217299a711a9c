"""Lanes of a `StreamSession` on the GPU, each with contexts, a stream, events and a captured graph."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from typing_extensions import override

from comask.kernels import run
from comask.kernels.launch import FRAME, MASKS
from comask.preprocess import prepare
from comask.runtime.device import Device, DeviceMemory, Stream
from comask.runtime.dlpack import UNORDERED, SharedArray
from comask.runtime.frames import Coding, Frame, borrow_frame
from comask.runtime.lanes import Batch, Edges, Outputs
from comask.runtime.trt.context_pool import ContextPool, Lent
from comask.runtime.trt.contexts import Contexts
from comask.runtime.trt.engine import Shape
from comask.runtime.trt.engine_folder import PLANS
from comask.runtime.trt.masks import LaneMasks

STAGES = tuple(PLANS)
PAUSE = 0.0002  # seconds between queries of an event, in a wait with a timeout


class TrtLane(Contexts):
    """Runs batches on its stream: it queues all work and does not wait for it.

    Args:
        parts: the arguments of `Contexts`.
        intake: the stream on which the frames are ready.
        graphs: whether both stages are captured as a CUDA graph when the same shapes come again.
    """

    def __init__(self, *parts: Any, intake: Stream, graphs: bool) -> None:
        super().__init__(*parts, graphs="captured" if graphs else "none")
        self._intake = intake
        self._changing = threading.Lock()  # held while the batch changes, or its outputs are read
        self._closed = False
        self._batch: Batch | None = None  # the batch that was started last
        self._tensors: dict[str, Shape] = {}  # that batch's shapes, by tensor name
        self._bitmaps: dict[int, tuple[int, Shape]] = {}  # that batch's, by the frame's place
        self._readers: set[int] = set()  # streams that read that batch's outputs
        self._reading: Batch | None = None  # the batch whose frames have not been read yet
        try:
            self._masks = LaneMasks(self._device, self.stream, self.buffers)
            self._read, self._done = self._device.event(), self._device.event()
        except BaseException:
            super().close()
            raise

    def suits(self, batch: Batch) -> bool:
        """Returns whether the last batch had the same shapes."""
        return self._tensors.get("images") == (len(batch.frames), *batch.canvas, 3)

    def start(self, batch: Batch) -> None:
        """Queues a batch, whose predecessor must be done; on an error the lane is free again."""
        count = len(batch.frames)
        fed: dict[str, Shape] = {"images": (count, *batch.canvas, 3), "image_sizes": (count, 2)}
        on_host = any(frame.device is None for frame in batch.frames)
        with self._changing, self._device:
            self.check_open()
            pasted, self._bitmaps = self._bitmaps, {}
            self._batch, self._tensors = batch, {}
            try:
                if pasted:  # since the last batch was done
                    self._done.synchronize()
                while self._readers:
                    self.stream.wait_for(self._readers.pop())
                self._tensors = self.reserve(STAGES, fed, fed if on_host else ("image_sizes",))
                self.stream.wait_for(self._intake.handle)
                sizes = [placement.size for placement in batch.placements]
                self.stage_in("image_sizes", np.array(sizes, np.int32))
                for place in range(count):
                    self._make_canvas(batch, place)
                self._read.record(self.stream)
                self._reading = batch
                self._queue_network(batch)
                self._done.record(self.stream)
            except BaseException:
                self.stream.synchronize()  # no memory may be freed while work on it is queued
                self._reading = None
                batch.release()
                raise
            batch.kept = {
                name: (self.buffers[name].address, self._tensors[name], self._specs[name].dtype)
                for name in self.output_names(STAGES)
            }

    def _queue_network(self, batch: Batch) -> None:
        """Queues both stages, the search for edges if wanted, and the copies to the host."""
        sizes, masks = ("image_sizes",), self._tensors["masks"]
        if not batch.rle:
            self.queue(STAGES, sizes, self._tensors)
            return
        depends = self._masks.prepare_edges(batch, masks)
        then = partial(self._masks.queue_edges, masks)
        self.queue(STAGES, sizes, self._tensors, then=then, depends=depends)

    def _make_canvas(self, batch: Batch, place: int) -> None:
        frame, images = batch.frames[place], self.buffers["images"]
        offset = place * batch.canvas[0] * batch.canvas[1] * 3
        if frame.device is None:
            staged = self.host_view("images", self._tensors["images"])[place]
            staged[...] = prepare(frame.pixels(), batch.preprocess).canvas
            self.stream.copy_in(images, staged, offset)
            return
        launch, addresses = frame.launch(batch.placements[place].size, batch.canvas)
        run.on_gpu(launch, addresses, images.address + offset, self.stream.handle)

    def wait(self, batch: Batch, seconds: float | None) -> bool:
        """Waits for the batch, at most `seconds`, and returns whether it is done.

        The caller does not hold the session's lock, so another thread may start the next batch. The event
        then belongs to that batch, and this one is done.
        """
        with self._device:
            if seconds is None:
                # race: we may wait once for a newer batch, which is harmless
                if self._batch is batch:
                    self._done.synchronize()
                return True
            end = time.monotonic() + seconds
            while not (done := self._batch is not batch or self._done.past()):
                if time.monotonic() >= end:
                    break
                time.sleep(PAUSE)
            return done

    def release_read(self) -> None:
        """Releases the caller's frames if they have been read."""
        if self._reading is not None:
            with self._device:
                read = self._read.past()
            if read:
                self._reading.release()
                self._reading = None

    def fetch(self, batch: Batch) -> tuple[Outputs, list[Edges] | None]:
        """Returns a complete batch's outputs and edges, which were copied to the host with it."""
        with self._changing, self._device:
            self.check_open()
            self.save_compiled()
            edges = self._masks.fetch_edges(batch, self._tensors["masks"]) if batch.rle else None
            return self.copied_out(self.output_names(STAGES), self._tensors), edges

    def outputs(self, batch: Batch) -> dict[str, SharedArray]:
        """Returns the batch's outputs by name, borrowed until the lane starts the next batch."""
        return {name: self._shared(batch, *output) for name, output in batch.kept.items()}

    def bitmaps(self, batch: Batch, place: int) -> SharedArray:
        """Queues the bitmaps of one frame; a wait for the batch waits for them, too."""
        with self._changing:
            self._check_holds(batch)
            if place not in self._bitmaps:
                with self._device:
                    pasted = self._masks.paste(batch, place, self._tensors["masks"])
                    self._done.record(self.stream)
                self._bitmaps[place] = pasted
            return self._shared(batch, *self._bitmaps[place], np.uint8)

    def _shared(self, batch: Batch, address: int, shape: Shape, dtype: DTypeLike) -> SharedArray:
        owner = BatchMemory(self, batch)
        return SharedArray(address, shape, np.dtype(dtype), self._device.index, owner)

    def wait_on(self, batch: Batch, stream: int) -> None:
        """Makes later work on a stream wait for the batch."""
        with self._changing:
            if self._batch is batch:  # otherwise the batch is done
                self._hold_back(stream)

    def wait_read(self, batch: Batch, stream: int) -> None:
        """Makes later work on a stream wait until the batch's frames have been read."""
        with self._changing, self._device:
            if self._batch is batch:
                self._read.hold_back(stream)

    def _hold_back(self, reader: int) -> None:
        """Makes later work on a stream wait for the last batch, and the next batch for that work."""
        with self._device:
            self._done.hold_back(reader)
        self._readers.add(reader)

    def share(self, batch: Batch, stream: int | None) -> int:
        """Makes a consumer's stream wait for the batch's outputs; returns the handle of the lane's."""
        with self._changing:
            self._check_holds(batch)
            if stream is not None:
                self._hold_back(stream)
            return self.stream.handle

    def copy(self, batch: Batch, array: SharedArray) -> SharedArray:
        """Waits for the batch and copies one of its outputs."""
        with self._changing:
            self._check_holds(batch)
            with self._device:
                return copied(self._device, self.stream, array)

    def _check_holds(self, batch: Batch) -> None:
        if self._closed:
            raise RuntimeError(
                "these outputs were borrowed and their session is closed: take .copy() before"
            )
        if self._batch is not batch:
            raise RuntimeError(
                "these outputs were borrowed and their slot is in use again: take .copy() in time, or "
                "more slots"
            )

    def check_open(self) -> None:
        """Raises RuntimeError if the backend was closed before the session."""
        if self._closed:
            raise RuntimeError("this backend is closed")

    @override
    def close(self) -> None:
        self.stream.synchronize()  # a session that nobody closed may have left work behind
        with self._changing:
            self._closed, self._batch = True, None  # invalidates outputs that are still borrowed
        if self._reading is not None:
            self._reading.release()
            self._reading = None
        self._read.close()
        self._done.close()
        self._masks.close()
        super().close()


@dataclass(frozen=True, slots=True)
class BatchMemory:
    """Owns a batch's outputs until its lane starts the next batch.

    Attributes:
        lane: the lane that holds the outputs.
        batch: the batch.
    """

    lane: TrtLane
    batch: Batch

    def share(self, stream: int | None) -> int:
        """Makes a consumer's stream wait for the outputs; returns the handle of the lane's stream."""
        return self.lane.share(self.batch, stream)

    def copy(self, array: SharedArray) -> SharedArray:
        """Waits for the outputs and copies one of them."""
        return self.lane.copy(self.batch, array)


class CopiedMemory:
    """Owns a copied output, which no queued work uses.

    Args:
        device: the memory's device.
        memory: the memory, which this object frees.
    """

    def __init__(self, device: Device, memory: DeviceMemory) -> None:
        self._device, self._memory = device, memory
        weakref.finalize(self, _free, device, memory)

    def shared(self, like: SharedArray) -> SharedArray:
        """Returns the memory as an array with another's shape and type."""
        return SharedArray(self._memory.address, like.shape, like.dtype, like.device, self)

    def share(self, stream: int | None) -> None:
        """Does nothing: the memory is already written."""

    def copy(self, array: SharedArray) -> SharedArray:
        """Copies the memory."""
        with self._device:
            stream = self._device.stream()
            try:
                return copied(self._device, stream, array)
            finally:
                stream.close()


def copied(device: Device, stream: Stream, array: SharedArray) -> SharedArray:
    """Copies an array on the GPU behind the stream's work, and waits; use it inside `with device:`."""
    memory = device.memory(max(1, array.dtype.itemsize * int(np.prod(array.shape))))
    stream.copy_over(memory, array.address)
    stream.synchronize()
    return CopiedMemory(device, memory).shared(array)


def _free(device: Device, memory: DeviceMemory) -> None:
    with device:
        memory.free()


class TrtLanes:
    """The lanes of one session over a pool's engines, and the stream on which its frames arrive.

    Args:
        pool: the pool, whose `close` closes the lanes if nothing else did.
        count: the number of lanes.
        graphs: see `TrtLane`.

    Raises:
        EngineError: if memory for the lanes runs out.
        KernelError: if the kernels for frames and masks cannot be compiled for the GPU.
    """

    def __init__(self, pool: ContextPool, count: int, *, graphs: bool) -> None:
        self._pool, self._device, self._lent = pool, pool.device, ExitStack()
        with self._device:
            for source in (FRAME, MASKS):
                run.prepare(source)
        try:
            self._intake = self._lend(lambda *_: self._device.stream())
            make = partial(TrtLane, intake=self._intake, graphs=graphs)
            self.lanes = [self._lend(make) for _ in range(count)]
        except BaseException:
            self.close()
            raise

    def _lend(self, make: Callable[..., Lent]) -> Lent:
        lent = self._pool.lend(make)
        self._lent.callback(self._pool.take_back, lent)
        return lent

    def borrow(self, source: Any, stream: int | None, coding: Coding) -> Frame:
        """Borrows a frame, which all batches started from now on may read."""
        self.lanes[0].check_open()
        with self._device:
            consumer = self._intake.handle if stream is None else UNORDERED
            frame = borrow_frame(source, consumer, coding)
            frame.require_on(self._device.index)
            if stream is None:
                for plane in frame.planes:
                    if plane.stream is not None:
                        self._intake.wait_for(plane.stream)
            elif frame.device is not None:
                self._intake.wait_for(stream)
            else:
                self._device.synchronize(stream)  # because the processor reads the frame
        return frame

    def close(self) -> None:
        """Frees all lanes and the stream; their batches must be done."""
        self._lent.close()
