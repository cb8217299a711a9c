"""Lanes of a `StreamSession` that keep all large arrays on PyTorch's or ONNX Runtime's GPU.

A kernel writes the canvas from the frame, both stages run on it, and kernels find the masks' edges for
RLEs, all in memory that the backend allocates. Only what `Detections` hold is copied to the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray
from typing_extensions import override

from comask.errors import KernelUnavailableError
from comask.kernels.launch import FRAME, MASKS, Launch, MaskLaunches, rgb_to_canvas_launch
from comask.runtime.dlpack import UNORDERED
from comask.runtime.frames import Coding, Frame, borrow_frame
from comask.runtime.lanes import (
    Batch,
    Computed,
    Edges,
    HostLane,
    HostLanes,
    mask_inputs,
    pasted,
)

MAY_BE_PASTED = (
    "masks",
    "boxes",
    "mask_boxes",
    "num_detections",
)  # whatever the model: see `pasted`
SOURCES = (FRAME, MASKS)  # the kernels that the lanes need

logger = logging.getLogger(__name__)


class Memory(Protocol):
    """Allocates a backend's own arrays on its device, and runs kernels on them.

    Attributes:
        gpu: index of the GPU; None for the host.
    """

    gpu: int | None

    def prepare(self, source: str) -> None:
        """Compiles and loads a kernel.

        Raises:
            KernelUnavailableError: if the driver or a compiler is missing.
        """

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Allocates an array."""

    def from_host(self, array: NDArray[Any]) -> Any:
        """Copies an array to the device."""

    def to_host(self, value: Any) -> NDArray[Any]:
        """Copies an array to the host, once the work that was queued before is done."""

    def address(self, value: Any) -> int:
        """Returns the address of an array's first byte."""

    def launch(self, launch: Launch, inputs: Sequence[int], output: int) -> None:
        """Runs a kernel between the backend's own work of this thread."""

    @property
    def stream(self) -> int:
        """Handle of the stream of `launch`, as DLPack writes it."""

    def synchronize(self, stream: int) -> None:
        """Waits for the work that is now queued on a stream, given by its handle."""


def with_kernels(memory: Memory, backend: str) -> Memory | None:
    """Returns a memory whose lanes have all their kernels, or None after a warning.

    Raises:
        KernelError: if a kernel cannot be compiled.
    """
    try:
        for source in SOURCES:
            memory.prepare(source)
    except KernelUnavailableError as error:
        logger.warning("%s takes frames on the host alone: %s", backend, error)
        return None
    return memory


class ResidentLane(HostLane):
    """Runs batches in the worker's thread on the backend's device.

    Args:
        run: see `Stages.run`.
        memory: the backend's memory.
        worker: the worker of all lanes.
    """

    def __init__(
        self, run: Callable[..., dict[str, Any]], memory: Memory, worker: futures.Executor
    ) -> None:
        super().__init__(run, worker)
        self._memory = memory

    @override
    def start(self, batch: Batch) -> None:
        try:
            canvases = self._canvases(batch)
        finally:
            batch.release()
        sizes = np.array([place.size for place in batch.placements], np.int32)
        batch.kept = self._worker.submit(self._found, canvases, sizes, batch)

    def _canvases(self, batch: Batch) -> Any:
        """Writes the frames onto their canvases and waits until they were read."""
        shape = (len(batch.frames), *batch.canvas, 3)
        canvases = self._memory.empty(shape, np.uint8)
        start, step = self._memory.address(canvases), int(np.prod(shape[1:]))
        copied = []  # frames of the host, kept until the kernels have read them
        for place, (frame, image) in enumerate(zip(batch.frames, batch.placements, strict=True)):
            if frame.device is None:
                pixels = frame.pixels()
                copied.append(self._memory.from_host(pixels))
                inputs = [self._memory.address(copied[-1])]
                rows = 3 * pixels.shape[1], 3, 1
                launch = rgb_to_canvas_launch(frame.size, rows, image.size, batch.canvas)
            else:
                launch, inputs = frame.launch(image.size, batch.canvas)
            self._memory.launch(launch, inputs, start + place * step)
        self._memory.synchronize(self._memory.stream)
        return canvases

    def _found(self, canvases: Any, sizes: NDArray[Any], batch: Batch) -> Computed:
        outputs = self._run(canvases, sizes, keep=MAY_BE_PASTED if batch.rle else ())
        if not batch.rle:
            return outputs, None
        names = pasted(outputs)
        addresses = [self._memory.address(outputs[name]) for name in names]
        kept = outputs.keys() & set(MAY_BE_PASTED)
        copied = outputs | {name: self._memory.to_host(outputs[name]) for name in kept}
        shape = copied["masks"].shape
        edges = [
            self._edges(batch.mask_launches(place, shape), mask_inputs(addresses, place, shape))
            for place in range(len(batch.frames))
        ]
        return copied, edges

    def _edges(self, pasting: MaskLaunches, inputs: tuple[int, int, int]) -> Edges:
        """Waits for the edges of one frame's masks."""
        probs, boxes, found = inputs
        memory, count = self._memory, pasting.masks
        counts = memory.empty((count * (1 + pasting.image_size[1]),), np.int32)
        memory.launch(pasting.edge_counts(), [probs, boxes, found], memory.address(counts))
        per_mask = memory.to_host(counts)[:count]
        total = int(per_mask.sum())
        places = memory.empty((max(total, 1),), np.int32)
        searched = [probs, boxes, memory.address(counts)]
        memory.launch(pasting.edges(total), searched, memory.address(places))
        return per_mask, memory.to_host(places)[:total]


class ResidentLanes(HostLanes):
    """Lanes whose batches one thread runs on the backend's device.

    Args:
        backend: the backend's name.
        run: see `Stages.run`.
        memory: the backend's memory.
        count: the number of lanes.
    """

    def __init__(
        self, backend: str, run: Callable[..., dict[str, Any]], memory: Memory, count: int
    ) -> None:
        super().__init__(backend, run, count)
        self._memory = memory
        self.lanes = [ResidentLane(run, memory, self._worker) for _ in range(count)]

    @override
    def borrow(self, source: Any, stream: int | None, coding: Coding) -> Frame:
        """Borrows a frame on the host or on the backend's device, and waits for those who write it."""
        if stream is not None:
            self._memory.synchronize(stream)
        frame = borrow_frame(source, self._memory.stream if stream is None else UNORDERED, coding)
        frame.require_on(self._memory.gpu)
        for plane in frame.planes if stream is None else ():
            if plane.stream is not None:
                self._memory.synchronize(plane.stream)
        return frame
