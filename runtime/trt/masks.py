"""Pastes the masks of a lane's batch into their images on the GPU: as bitmaps, or as edges for RLEs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from comask.kernels import run
from comask.kernels.launch import Launch, MaskLaunches
from comask.runtime.device import Device, DeviceMemory, PinnedMemory, Stream
from comask.runtime.lanes import Batch, Edges, mask_inputs, pasted
from comask.runtime.trt.contexts import grow
from comask.runtime.trt.engine import Shape

# Initial room per frame: two edges per column of 80 compact masks that are 100 pixels wide.
EDGES = 1 << 14
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
        self._capacity = EDGES  # the number of edges for which each frame has room
        self._searches: list[MaskLaunches] = []  # of each frame of the last batch

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
        self._launch(
            batch.mask_launches(place, masks).bitmaps(), self._inputs(place, masks), memory
        )
        return memory.address, shape

    def prepare_edges(self, batch: Batch, masks: Shape) -> object:
        """Makes room for the edges that `queue_edges` will find; `paste` explains the arguments.

        Returns:
            all that `queue_edges` depends on.

        Raises:
            EngineError: if memory runs out.
            KernelError: if the kernels do not support these sizes.
        """
        count, frames = masks[1], range(len(batch.frames))
        self._searches = [batch.mask_launches(place, masks) for place in frames]
        rooms = [
            (
                self._room(
                    "counts", place, INT * count * (1 + self._searches[place].image_size[1])
                ),
                self._room("edges", place, INT * self._capacity),
            )
            for place in frames
        ]
        needed = INT * len(frames) * (count + self._capacity)
        staged = grow(self._staging, "edges", needed, self._device.pinned, self._stream)
        addresses = [memory.address for room in rooms for memory in room]
        return self._searches, masks, self._capacity, addresses, staged.address

    def queue_edges(self, masks: Shape) -> None:
        """Queues the search for all edges, and their copies to the host; nothing is allocated.

        As many edges are copied as there is room for, so that no one has to wait for their number.
        """
        counts, edges = self._staged_edges(masks)
        for place, search in enumerate(self._searches):
            found, places = self._buffers["counts", place], self._buffers["edges", place]
            probs, boxes, number = self._inputs(place, masks)
            self._launch(search.edge_counts(), [probs, boxes, number], found)
            self._launch(search.edges(self._capacity), [probs, boxes, found.address], places)
            self._stream.copy_out(counts[place], found)
            self._stream.copy_out(edges[place], places)

    def fetch_edges(self, batch: Batch, masks: Shape) -> list[Edges]:
        """Returns the edges that `queue_edges` found, once that is done; the arrays belong to the caller.

        If there were more than there is room for, room is made and they are searched again.
        """
        counts, edges = self._staged_edges(masks)
        totals = counts.sum(axis=1).tolist()
        if max(totals) > self._capacity:
            # A power of two, so that there are few sizes, since each needs a graph of its own.
            self._capacity = 1 << (max(totals) - 1).bit_length()
            self.prepare_edges(batch, masks)
            self.queue_edges(masks)
            self._stream.synchronize()
            return self.fetch_edges(batch, masks)
        return [(c.copy(), e[:n].copy()) for c, e, n in zip(counts, edges, totals, strict=True)]

    def _staged_edges(self, masks: Shape) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns views of page-locked memory: each frame's edges per mask, and its edges."""
        frames, count = len(self._searches), masks[1]
        values = self._staging["edges"].bytes.view(np.int32)
        counts = values[: frames * count].reshape(frames, count)
        edges = values[counts.size :][: frames * self._capacity].reshape(frames, self._capacity)
        return counts, edges

    def _inputs(self, place: int, masks: Shape) -> tuple[int, int, int]:
        names = pasted(self._outputs)
        return mask_inputs([self._outputs[name].address for name in names], place, masks)

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
