"""Masks of a lane's batch in their images, on the GPU: as bitmaps, and as edges for COCO's RLE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from comask.kernels import driver
from comask.kernels.launch import Launch
from comask.kernels.launch_masks import (
    mask_edge_counts_launch,
    mask_edges_launch,
    paste_masks_launch,
)
from comask.runtime.device import Device, DeviceMemory, PinnedMemory
from comask.runtime.lanes import Batch, Edges
from comask.runtime.trt.engine import Shape
from comask.runtime.trt.slot import Slot

INPUTS = ("masks", "boxes", "num_detections")  # of the kernels, as stage 2 calls them
EDGES_A_COLUMN = 2  # room to begin with: what compact masks have
INT = np.dtype(np.int32).itemsize


class LaneMasks:
    """What pastes a lane's masks, in buffers that grow and never shrink; all inside `with device:`.

    Args:
        device: of the slot.
        slot: that stage 2 writes its outputs in.
    """

    def __init__(self, device: Device, slot: Slot) -> None:
        self._device, self._slot = device, slot
        self._buffers: dict[tuple[str, int], DeviceMemory] = {}  # by content and place
        self._staging: PinnedMemory | None = None
        self._capacity = 0  # edges of a frame that there is room for

    def paste(self, batch: Batch, place: int, masks: Shape) -> tuple[int, Shape]:
        """Queues bitmaps of one frame.

        Args:
            batch: whose outputs the slot holds.
            place: of the frame in it.
            masks: shape of stage 2's output, [B, D, M, M].

        Returns:
            (address, shape) of u8 [D, h, w].

        Raises:
            EngineError: there is no memory for them.
            KernelError: the kernel cannot do it.
        """
        image = batch.places()[place]
        launch = paste_masks_launch(
            masks[1], masks[2], image.original_size, batch.mask_threshold, image.scale
        )
        shape = (masks[1], *image.original_size)
        memory = self._room("bitmaps", place, math.prod(shape))
        self._launch(launch, self._inputs(place, masks), memory)
        return memory.address, shape

    def find_edges(self, batch: Batch, masks: Shape) -> None:
        """Queues the search for all frames' edges; arguments and errors are those of `paste`."""
        count, cells = masks[1:3]
        images = batch.places()
        widest = max(image.original_size[1] for image in images)
        self._capacity = max(self._capacity, EDGES_A_COLUMN * count * widest)
        for place, image in enumerate(images):
            size, threshold, scale = image.original_size, batch.mask_threshold, image.scale
            counts = self._room("counts", place, INT * count * (1 + size[1]))
            edges = self._room("edges", place, INT * self._capacity)
            probs, boxes, found = self._inputs(place, masks)
            first = mask_edge_counts_launch(count, cells, size, threshold, scale)
            self._launch(first, [probs, boxes, found], counts)
            second = mask_edges_launch(count, cells, size, threshold, self._capacity, scale)
            self._launch(second, [probs, boxes, counts.address], edges)
        needed = INT * len(images) * (count + self._capacity)
        if self._staging is None or self._staging.bytes.size < needed:
            if self._staging is not None:
                self._staging.free()
                self._staging = None
            self._staging = self._device.pinned(needed)

    def fetch_edges(self, batch: Batch, masks: Shape) -> list[Edges]:
        """Waits for what `find_edges` found of the same arguments; the arrays are the caller's."""
        assert self._staging is not None
        frames, count = len(batch.frames), masks[1]
        staged = self._staging.bytes.view(np.int32)
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
                self._slot.stream.copy_out(array, self._buffers[content, place])
        self._slot.stream.synchronize()

    def _inputs(self, place: int, masks: Shape) -> list[int]:
        """Addresses of one frame's outputs."""
        count, cells = masks[1:3]
        steps = (count * cells * cells, 4 * count, 1)  # elements a frame, of 4 bytes each
        return [
            self._slot.buffers[name].address + 4 * place * step
            for name, step in zip(INPUTS, steps, strict=True)
        ]

    def _launch(self, launch: Launch, inputs: Sequence[int], output: DeviceMemory) -> None:
        driver.launch(launch, inputs, output.address, self._slot.stream.handle)

    def _room(self, content: str, place: int, size: int) -> DeviceMemory:
        held = self._buffers.get((content, place))
        if held is not None and held.size >= size:
            return held
        if held is not None:
            del self._buffers[content, place]
            self._slot.stream.synchronize()  # which waits for whom earlier bitmaps were lent to
            held.free()
        self._buffers[content, place] = self._device.memory(max(size, 1))  # CUDA has no empty ones
        return self._buffers[content, place]

    def close(self) -> None:
        """Frees everything; no work may be queued."""
        for memory in self._buffers.values():
            memory.free()
        if self._staging is not None:
            self._staging.free()
        self._buffers, self._staging = {}, None
