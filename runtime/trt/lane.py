"""Lanes of a `StreamSession` on the GPU: each a slot, its events and its captured graph."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from comask.errors import EngineError, ImageError
from comask.kernels import driver
from comask.kernels.launch_frames import FRAME, Matrix
from comask.kernels.launch_masks import MASKS
from comask.preprocess import prepare
from comask.runtime.device import Device, Graph, Stream
from comask.runtime.dlpack import UNORDERED, SharedArray
from comask.runtime.frames import Format, Frame, borrow_frame
from comask.runtime.lanes import Batch, Fetched, Lane
from comask.runtime.trt.engine import Shape
from comask.runtime.trt.engine_folder import PLANS
from comask.runtime.trt.lane_masks import LaneMasks
from comask.runtime.trt.slot import CopiedMemory, Slot
from comask.runtime.trt.slot_pool import SlotPool

STAGES = tuple(PLANS)
PAUSE = 0.0002  # seconds between looks at an event, where a wait has an end

logger = logging.getLogger(__name__)


class TrtLane:
    """Runs batches in one slot: all is queued, nothing waits.

    Args:
        device: of the slot.
        slot: of this lane alone.
        intake: stream that the frames are ready on.
        graphs: whether both stages are captured as a CUDA graph when the same shapes come again.

    Attributes:
        batches: started so far: who borrows outputs knows by it whose they are.
        closed: whether the slot is.
        changing: held while that number changes, or what was borrowed is read.
    """

    def __init__(self, device: Device, slot: Slot, intake: Stream, *, graphs: bool) -> None:
        self._device, self._slot, self._intake = device, slot, intake
        self._graphs = graphs
        self._graph: Graph | None = None
        self._layout: object = None  # that the graph was captured for, or is to be next time
        self._readers: set[int] = set()  # streams that the last batch's outputs are read on
        self._reading: Batch | None = None
        self._shapes: dict[str, Shape] = {}
        self._masks = LaneMasks(device, slot)
        self._batch: Batch | None = None
        self.batches, self.closed = 0, False
        self.changing = threading.Lock()
        self._read, self._done = device.event(), device.event()
        slot.closing.callback(self._close)

    def suits(self, batch: Batch) -> bool:
        """See `Lane`."""
        return self._shapes.get("images") == (len(batch.frames), *batch.canvas, 3)

    def start(self, batch: Batch) -> None:
        """See `Lane`."""
        slot, count, canvas = self._slot, len(batch.frames), batch.canvas
        fed: dict[str, Shape] = {"images": (count, *canvas, 3), "image_sizes": (count, 2)}
        on_host = any(frame.device is None for frame in batch.frames)
        with self.changing, self._device:
            self.check_open()
            self.batches += 1
            self._batch, self._shapes = batch, {}
            try:
                self._done.synchronize()  # bitmaps may have been asked for since
                readers, self._readers = self._readers, set()
                for reader in readers:
                    slot.stream.wait_for(reader)
                self._shapes = slot.reserve(STAGES, fed, fed if on_host else ("image_sizes",))
                slot.stream.wait_for(self._intake.handle)
                sizes = slot.host_view("image_sizes", (count, 2))
                sizes[...] = batch.sizes
                slot.stream.copy_in(slot.buffers["image_sizes"], sizes)
                for place in range(count):
                    self._make_canvas(batch, place)
                self._read.record(slot.stream)
                self._reading = batch
                self._enqueue()
                if batch.rle:
                    self._masks.find_edges(batch, self._shapes["masks"])
                self._done.record(slot.stream)
            except BaseException:
                slot.stream.synchronize()  # nothing may move while work is queued
                self._reading = None
                batch.release()
                self._drop_graph()  # contexts may have been told other shapes
                raise

    def _make_canvas(self, batch: Batch, place: int) -> None:
        slot, frame, images = self._slot, batch.frames[place], self._slot.buffers["images"]
        canvas = batch.canvas
        offset = place * canvas[0] * canvas[1] * 3
        if frame.device is None:
            staged = slot.host_view("images", self._shapes["images"])[place]
            staged[...] = prepare(frame.pixels(), batch.preprocess).canvas
            slot.stream.copy_in(images, staged, offset)
            return
        launch, addresses = frame.launch(batch.sizes[place], canvas)
        driver.launch(launch, addresses, images.address + offset, slot.stream.handle)

    def _enqueue(self) -> None:
        """As a graph from the second batch of a layout on.

        The first runs as it is, as TensorRT may allocate and load then, which no capture allows. One
        graph is kept: TensorRT forbids those of earlier shapes once a context was told new ones.
        """
        slot, layout = self._slot, self._slot.layout(STAGES)
        if self._graphs and layout != self._layout:
            self._drop_graph()
            self._layout = layout
        elif self._graphs and self._graph is None:
            try:
                self._graph = slot.stream.capture(lambda: slot.enqueue(STAGES))
            except EngineError as error:
                logger.warning("without CUDA graphs from here on, capture failed: %s", error)
                self._graphs = False
        if self._graph is None:
            slot.enqueue(STAGES)
        else:
            self._graph.launch(slot.stream)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._graph = self._layout = None

    def past(self) -> bool:
        """See `Lane`."""
        with self._device:
            return self.closed or self._done.past()

    def wait(self, batch: int, seconds: float | None) -> bool:
        """Waits for the batch of this number, at most so long; whether it is done.

        Without the session's lock: another thread may start the next batch, after which the event says
        nothing of this one, which is done.
        """
        with self._device:
            if seconds is None:
                # a batch that starts right here is waited for in vain, once
                if self.batches == batch:
                    self._done.synchronize()
                return True
            end = time.monotonic() + seconds
            while not (past := self.batches != batch or self._done.past()):
                if time.monotonic() >= end:
                    break
                time.sleep(PAUSE)
            return past

    def release_read(self) -> None:
        """See `Lane`."""
        if self._reading is not None:
            with self._device:
                read = self._read.past()
            if read:
                self._reading.release()
                self._reading = None

    def loan(self) -> TrtLoan:
        """See `Lane`."""
        slot, names = self._slot, self._slot.output_names(STAGES)
        outputs = {
            name: (slot.buffers[name].address, self._shapes[name], slot.dtype(name))
            for name in names
        }
        return TrtLoan(self, self.batches, outputs)

    def bitmaps(self, place: int) -> tuple[int, Shape]:
        """Address and shape of a frame's bitmaps; who waits for the last batch waits for them too."""
        assert self._batch is not None
        with self._device:
            pasted = self._masks.paste(self._batch, place, self._shapes["masks"])
            self._done.record(self._slot.stream)
        return pasted

    def fetch(self) -> Fetched:
        """See `Lane`."""
        slot, names = self._slot, self._slot.output_names(STAGES)
        assert self._batch is not None
        with self.changing, self._device:
            self.check_open()
            for name in names:
                slot.stream.copy_out(slot.host_view(name, self._shapes[name]), slot.buffers[name])
            slot.stream.synchronize()
            edges = None
            if self._batch.rle:
                edges = self._masks.fetch_edges(self._batch, self._shapes["masks"])
            outputs = {n: slot.host_view(n, self._shapes[n]).copy() for n in names}
        return Fetched(outputs, edges)

    def check_open(self) -> None:
        """Raises RuntimeError when the backend was closed before the session."""
        if self.closed:
            raise RuntimeError("this backend is closed")

    def hold_back(self, reader: int) -> None:
        """Later work on a stream comes after the last batch, and the next batch after that work."""
        with self._device:
            self._done.hold_back(reader)
        self._readers.add(reader)

    def hold_back_writer(self, writer: int) -> None:
        """Later work on a stream, which may write the frames' memory, comes after they were read."""
        with self._device:
            self._read.hold_back(writer)

    @property
    def device(self) -> int:
        """Index of the GPU."""
        return self._device.index

    @property
    def stream(self) -> int:
        """Handle of the slot's stream."""
        return self._slot.stream.handle

    def copy(self, array: SharedArray) -> SharedArray:
        """An output's values in memory of their own, when they are there."""
        with self._device:
            memory = self._device.memory(max(1, array.dtype.itemsize * int(np.prod(array.shape))))
            self._slot.stream.copy_over(memory, array.address)
            self._slot.stream.synchronize()
        return CopiedMemory(self._device, memory).shared(array)

    def _close(self) -> None:
        """With the slot, whose work is done."""
        with self.changing:
            self.closed = True
            self.batches += 1  # outputs that are still borrowed are no more
        if self._reading is not None:
            self._reading.release()
            self._reading = None
        self._drop_graph()
        self._read.close()
        self._done.close()
        self._masks.close()


class TrtLanes:
    """Slots of a pool for one session, and the stream that its frames come in by.

    Args:
        pool: whose slots they are.
        count: how many.
        graphs: see `TrtLane`.

    Raises:
        EngineError: there is no memory for them.
        KernelError: the kernels for frames and masks cannot be compiled for the GPU.
    """

    def __init__(self, pool: SlotPool, count: int, *, graphs: bool) -> None:
        self._pool, self._device = pool, pool.device
        with self._device:
            for source in (FRAME, MASKS):
                driver.prepare(source)
        self._slots = pool.lend(count)
        try:
            with self._device:
                self._intake = self._device.stream()
                self._slots[0].closing.callback(self._intake.close)
                self._lanes = [
                    TrtLane(self._device, slot, self._intake, graphs=graphs) for slot in self._slots
                ]
        except BaseException:
            self.close()
            raise

    def open(self) -> Sequence[Lane]:
        """See `Lanes`."""
        return self._lanes

    def borrow(
        self, source: Any, stream: int | None, format: Format, matrix: Matrix, full_range: bool
    ) -> Frame:
        """See `Lanes`."""
        self._lanes[0].check_open()
        with self._device:
            consumer = self._intake.handle if stream is None else UNORDERED
            frame = borrow_frame(source, consumer, format, matrix, full_range)
            if frame.device not in (None, self._device.index):
                raise ImageError(
                    f"a frame is on GPU {frame.device}, this predictor on GPU {self._device.index}; "
                    "load one there with device="
                )
            if stream is None:
                for plane in frame.planes:
                    if plane.stream is not None:
                        self._intake.wait_for(plane.stream)
            elif frame.device is not None:
                self._intake.wait_for(stream)
            else:
                self._device.synchronize(stream)  # the processor reads it
        return frame

    def close(self) -> None:
        """See `Lanes`."""
        self._pool.take_back(self._slots)


class TrtLoan:
    """A batch's outputs in a lane, and the owner of what others see of them.

    Args:
        lane: that they lie in.
        batch: the number of theirs.
        outputs: address, shape and type of each, by name.
    """

    def __init__(
        self, lane: TrtLane, batch: int, outputs: dict[str, tuple[int, Shape, np.dtype[Any]]]
    ) -> None:
        self._lane, self._batch, self._outputs = lane, batch, outputs
        self._bitmaps: dict[int, tuple[int, Shape]] = {}  # by the frame's place

    def wait(self, seconds: float | None) -> bool:
        """See `Loan`."""
        return self._lane.wait(self._batch, seconds)

    def wait_on(self, stream: int) -> None:
        """See `Loan`."""
        with self._lane.changing:
            if self._lane.batches == self._batch:  # else it is done
                self._lane.hold_back(stream)

    def wait_read(self, stream: int) -> None:
        """See `Loan`."""
        with self._lane.changing:
            if self._lane.batches == self._batch:
                self._lane.hold_back_writer(stream)

    def outputs(self) -> dict[str, SharedArray]:
        """See `Loan`."""
        return {
            name: SharedArray(*what, self._lane.device, self)
            for name, what in self._outputs.items()
        }

    def bitmaps(self, place: int) -> SharedArray:
        """See `Loan`."""
        with self._lane.changing:
            self._check()
            if place not in self._bitmaps:
                self._bitmaps[place] = self._lane.bitmaps(place)
        address, shape = self._bitmaps[place]
        return SharedArray(address, shape, np.dtype(np.uint8), self._lane.device, self)

    def _check(self) -> None:
        if self._lane.closed:
            raise RuntimeError(
                "these outputs were borrowed and their session is closed: take .copy() before"
            )
        if self._lane.batches != self._batch:
            raise RuntimeError(
                "these outputs were borrowed and their slot is in use again: take .copy() in time, or "
                "more slots"
            )

    def share(self, stream: int | None) -> int:
        """See `Owner`."""
        with self._lane.changing:
            self._check()
            if stream is not None:
                self._lane.hold_back(stream)
            return self._lane.stream

    def copy(self, array: SharedArray) -> SharedArray:
        """See `Owner`."""
        with self._lane.changing:
            self._check()
            return self._lane.copy(array)
