"""Pastes the masks of a lane's batch into their images on the GPU: as bitmaps, or as edges for RLEs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from comask.kernels import run
from comask.kernels.launch import Launch, MaskLaunches
from comask.runtime.device import Device, DeviceMemory, PinnedMemory, Stream
from comask.runtime.lanes import Batch, Edges
from comask.runtime.trt.contexts import grow
from comask.runtime.trt.engine import Shape

INPUTS = ("masks", "boxes", "num_detections")  # the kernels' inputs by stage 2's names
EDGES_A_COLUMN = 2  # initial room per mask and column, which is enough for compact masks
INT = np.dtype(np.int32).itemsize


class LaneMasks:
    """Pastes a lane's masks in buffers that grow and never shrink; use it inside `with device:`.

    Args:
        device: the lane's device.
        stream: the lane's stream.
        outputs: the buffers that stage 2 writes, by name.
    """

    def __init__(self, device: Device, stream: Stream, outputs: Mapping[str, DeviceMemory]) -> None:
        self._device, self._stream, self._outputs = device, stream, outputs
        self._buffers: dict[tuple[str, int], DeviceMemory] = {}  # by content and the frame's place
        self._staging: dict[str, PinnedMemory] = {}
        self._capacity = 0  # the number of edges for which each frame has room

    def paste(self, batch: Batch, place: int, masks: Shape) -> tuple[int, Shape]:
        """Queues the bitmaps of one frame.

        Args:
            batch: the batch whose outputs the lane holds.
            place: the frame's index in the batch.
            masks: shape of stage 2's output, [B, D, M, M].

        Returns:
            (address, shape) of u8 [D, h, w].

        Raises:
            EngineError: if memory for the bitmaps runs out.
            KernelError: if the kernel does not support these sizes.
        """
        image = batch.placements[place]
        shape = (masks[1], *image.original_size)
        memory = self._room("bitmaps", place, math.prod(shape))
        self._launch(_launches(batch, place, masks).bitmaps(), self._inputs(place, masks), memory)
        return memory.address, shape

    def find_edges(self, batch: Batch, masks: Shape) -> None:
        """Queues the search for the edges of all frames; `paste` explains arguments and errors."""
        count, widths = masks[1], [place.original_size[1] for place in batch.placements]
        self._capacity = max(self._capacity, EDGES_A_COLUMN * count * max(widths))
        for place, width in enumerate(widths):
            launches = _launches(batch, place, masks)
            counts = self._room("counts", place, INT * count * (1 + width))
            edges = self._room("edges", place, INT * self._capacity)
            probs, boxes, found = self._inputs(place, masks)
            self._launch(launches.edge_counts(), [probs, boxes, found], counts)
            self._launch(launches.edges(self._capacity), [probs, boxes, counts.address], edges)
        needed = INT * len(widths) * (count + self._capacity)
        grow(self._staging, "edges", needed, self._device.pinned, self._stream)

    def fetch_edges(self, batch: Batch, masks: Shape) -> list[Edges]:
        """Waits for `find_edges` and returns its edges in arrays that belong to the caller."""
        frames, count = len(batch.frames), masks[1]
        staged = self._staging["edges"].bytes.view(np.int32)
        counts = staged[: frames * count].reshape(frames, count)
        self._copy_out("counts", list(counts))
        totals = counts.sum(axis=1).tolist()
        if max(totals) > self._capacity:
            self._capacity = max(totals)
            self.find_edges(batch, masks)
            return self.fetch_edges(batch, masks)
        edges = np.split(staged[counts.size :], np.cumsum(totals))[:frames]
        self._copy_out("edges", edges)
        return [(c.copy(), e.copy()) for c, e in zip(counts, edges, strict=True)]

    def _copy_out(self, content: str, arrays: Sequence[NDArray[np.int32]]) -> None:
        for place, array in enumerate(arrays):
            if array.size:
                self._stream.copy_out(array, self._buffers[content, place])
        self._stream.synchronize()

    def _inputs(self, place: int, masks: Shape) -> list[int]:
        """Returns the addresses of one frame's outputs."""
        count, cells = masks[1:3]
        steps = (count * cells * cells, 4 * count, 1)  # elements per frame, of 4 bytes each
        return [
            self._outputs[name].address + 4 * place * step
            for name, step in zip(INPUTS, steps, strict=True)
        ]

    def _launch(self, launch: Launch, inputs: Sequence[int], output: DeviceMemory) -> None:
        run.on_gpu(launch, inputs, output.address, self._stream.handle)

    def _room(self, content: str, place: int, size: int) -> DeviceMemory:
        return grow(self._buffers, (content, place), size, self._device.memory, self._stream)

    def close(self) -> None:
        """Frees all memory; no queued work may use it."""
        for memory in self._buffers.values():
            memory.free()
        for staged in self._staging.values():
            staged.free()
        self._buffers, self._staging = {}, {}


def _launches(batch: Batch, place: int, masks: Shape) -> MaskLaunches:
    image = batch.placements[place]
    return MaskLaunches(masks[1], masks[2], image.original_size, batch.mask_threshold, image.scale)
