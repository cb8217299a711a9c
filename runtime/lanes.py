"""Lanes, each of which runs one of a `StreamSession`'s batches at a time: interfaces, and the host's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig
from comask.errors import ImageError
from comask.kernels.launch import MaskLaunches, Size
from comask.preprocess import Placement, padded_shape, prepare, resized_shape, stacked
from comask.runtime.dlpack import UNORDERED, HostMemory, SharedArray
from comask.runtime.frames import Coding, Frame, borrow_frame
from comask.segmentation import Integers, rles_from_edges
from comask.structures import Detections, detections_from_outputs

Outputs: TypeAlias = dict[str, NDArray[Any]]  # stage 2's outputs by name
Edges: TypeAlias = tuple[Integers, Integers]  # edge_counts and edges, see `comask.segmentation`
Computed: TypeAlias = tuple[Outputs, list[Edges] | None]  # `Batch.outputs` and `Batch.edges`


@dataclass(eq=False)
class Batch:
    """Frames of one canvas that run together, and their results.

    Attributes:
        frames: the frames, in the caller's memory.
        preprocess: resize and padding.
        mask_threshold: a pixel belongs to a mask if its probability is at least this.
        rle: whether a GPU that holds the masks also finds their edges.
        placements: where each frame lies on its canvas, to map detections back.
        canvas: (H, W) in pixels.
        lane: the lane that runs or ran the batch; None while it waits for one.
        kept: the lane's own record of the batch: on the host its work, on a GPU the outputs' addresses.
        outputs: stage 2's outputs on the host, once they were fetched; they belong to the caller.
        edges: the edges of each frame's D masks; None if the lane does not find edges.
        error: the error that the batch ended with.

    Raises:
        ImageError: if the frames need different canvases.
    """

    frames: tuple[Frame, ...]
    preprocess: PreprocessConfig
    mask_threshold: float
    rle: bool
    placements: list[Placement] = field(init=False)
    canvas: Size = field(init=False)
    lane: Lane | None = None
    kept: Any = None
    outputs: Outputs | None = None
    edges: list[Edges] | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.placements = [
            Placement(resized_shape(frame.size, self.preprocess), frame.size)
            for frame in self.frames
        ]
        canvases = {padded_shape(place.size, self.preprocess) for place in self.placements}
        if len(canvases) != 1:
            raise ImageError(
                f"a batch of frames needs canvases of {sorted(canvases)}; expected one for all: submit "
                "frames of another size on their own"
            )
        (self.canvas,) = canvases

    @property
    def settled(self) -> bool:
        """Whether the batch has ended: its outputs are on the host, or it failed."""
        return self.outputs is not None or self.error is not None

    def mask_launches(self, place: int, masks: tuple[int, ...]) -> MaskLaunches:
        """Returns the launches that paste the masks of one frame, given by its place in the batch.

        Args:
            place: the frame's place.
            masks: shape of stage 2's output, [B, D, M, M].

        Raises:
            KernelError: if the kernels do not support these sizes.
        """
        image = self.placements[place]
        return MaskLaunches(
            masks[1], masks[2], image.original_size, self.mask_threshold, image.scale
        )

    def release(self) -> None:
        """Releases the caller's memory."""
        for frame in self.frames:
            frame.release()

    def with_rles(self, results: list[Detections]) -> list[Detections]:
        """Returns each frame's detections with the RLEs of their masks."""
        if self.edges is None:
            rles = [detections.to_rle() for detections in results]
        else:
            rles = [
                rles_from_edges(counts[: len(detections)], edges, detections.image_size)
                for detections, (counts, edges) in zip(results, self.edges, strict=True)
            ]
        return [d.with_rles(r) for d, r in zip(results, rles, strict=True)]


def pasted(outputs: Collection[str]) -> tuple[str, str, str]:
    """Returns the names of the masks' kernels' inputs among stage 2's outputs."""
    return "masks", "mask_boxes" if "mask_boxes" in outputs else "boxes", "num_detections"


def mask_inputs(outputs: Sequence[int], place: int, masks: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns the addresses of one frame's part of the outputs `pasted`; see `Batch.mask_launches`."""
    count, cells = masks[1:3]
    steps = count * cells * cells, 4 * count, 1  # numbers of 4 bytes per frame
    probs, boxes, found = (
        start + 4 * place * step for start, step in zip(outputs, steps, strict=True)
    )
    return probs, boxes, found


class Lane(Protocol):
    """Runs one batch at a time; its methods take only batches that it started itself."""

    def suits(self, batch: Batch) -> bool:
        """Returns whether the last batch had the same shapes, so that all is prepared for this one."""

    def start(self, batch: Batch) -> None:
        """Starts a batch, whose predecessor must be done.

        Raises:
            ComaskError: if the batch cannot start; the lane is free again.
        """

    def wait(self, batch: Batch, seconds: float | None) -> bool:
        """Waits for the batch, at most `seconds`, and returns whether it is done."""

    def release_read(self) -> None:
        """Releases the caller's frames if they have been read."""

    def fetch(self, batch: Batch) -> Computed:
        """Returns `outputs` and `edges` of the last batch, which must be done.

        Raises:
            Exception: the error that the batch ended with.
        """

    def outputs(self, batch: Batch) -> dict[str, SharedArray]:
        """Returns the batch's outputs where they lie; see `Future.outputs`."""

    def bitmaps(self, batch: Batch, place: int) -> SharedArray:
        """Returns the masks of one frame in its own pixels; see `Future.bitmaps`."""

    def wait_on(self, batch: Batch, stream: int) -> None:
        """Makes later work on a stream wait for the batch; see `Future.wait_on`."""

    def wait_read(self, batch: Batch, stream: int) -> None:
        """Makes later work on a stream wait until the frames were read; see `Future.wait_read`."""


class Lanes(Protocol):
    """All lanes of one session."""

    @property
    def lanes(self) -> Sequence[Lane]:
        """The lanes."""

    def borrow(self, source: Any, stream: int | None, coding: Coding) -> Frame:
        """Borrows a frame, which all batches started from now on may read.

        Args:
            source: see `borrow_frame`.
            stream: handle of the caller's stream that writes the frame; None for the producer's.
            coding: the coding of the frame's bytes.

        Raises:
            ImageError: if it is not a frame, or lies where this backend cannot read it.
            EngineError: if the stream is invalid.
        """

    def close(self) -> None:
        """Frees all lanes, whose batches must be done."""


class HostLane:
    """Runs batches in the worker's thread, with a backend that reads and writes the host's memory.

    Args:
        run: see `Stages.run`.
        worker: the worker of all lanes.
    """

    def __init__(self, run: Callable[..., Outputs], worker: futures.Executor) -> None:
        self._run, self._worker = run, worker

    def suits(self, batch: Batch) -> bool:
        """Returns True, since nothing is prepared for particular shapes."""
        return True

    def start(self, batch: Batch) -> None:
        """Reads the frames and queues the batch."""
        try:
            prepared = [prepare(frame.pixels(), batch.preprocess) for frame in batch.frames]
        finally:
            batch.release()
        batch.kept = self._worker.submit(self._computed, *stacked(prepared))

    def _computed(self, images: NDArray[Any], image_sizes: NDArray[Any]) -> Computed:
        return self._run(images, image_sizes), None

    def wait(self, batch: Batch, seconds: float | None) -> bool:
        """Waits for the batch, at most `seconds`, and returns whether it is done."""
        return bool(futures.wait([batch.kept], seconds).done)

    def release_read(self) -> None:
        """Does nothing, since `start` releases the frames."""

    def fetch(self, batch: Batch) -> Computed:
        """Returns the batch's outputs and edges, or raises its error."""
        computed: Computed = batch.kept.result()
        return computed

    def outputs(self, batch: Batch) -> dict[str, SharedArray]:
        """Waits for the batch and returns its outputs, which stay valid."""
        return HostMemory(batch.kept.result()[0]).shared()

    def bitmaps(self, batch: Batch, place: int) -> SharedArray:
        """Waits for the batch and returns the masks of one frame in its own pixels."""
        outputs = batch.kept.result()[0]
        detections = detections_from_outputs(
            outputs, batch.placements, mask_threshold=batch.mask_threshold
        )[place]
        bitmaps = np.zeros((outputs["boxes"].shape[1], *detections.image_size), np.uint8)
        bitmaps[: len(detections)] = detections.masks
        return HostMemory({"bitmaps": bitmaps}).shared()["bitmaps"]

    def wait_on(self, batch: Batch, stream: int) -> None:
        """Waits for the batch in the caller's thread."""
        self.wait(batch, None)

    def wait_read(self, batch: Batch, stream: int) -> None:
        """Does nothing, since `start` reads the frames."""


class HostLanes:
    """Lanes whose batches one thread runs one after the other; the backend has threads of its own.

    Args:
        backend: the backend's name.
        run: see `Stages.run`.
        count: the number of lanes.
    """

    def __init__(self, backend: str, run: Callable[..., Outputs], count: int) -> None:
        self._backend = backend
        self._worker = futures.ThreadPoolExecutor(1, "comask")
        self.lanes: Sequence[Lane] = [HostLane(run, self._worker) for _ in range(count)]

    def borrow(self, source: Any, stream: int | None, coding: Coding) -> Frame:
        """Borrows a frame, which must lie in the host's memory."""
        frame = borrow_frame(source, UNORDERED, coding)
        if frame.device is not None:
            raise ImageError(
                f"a frame is on GPU {frame.device}, and {self._backend} reads the host's memory: "
                "copy the frame to the host, or take a backend on the GPU"
            )
        if stream is not None:
            raise ImageError(
                f"a frame is written on CUDA stream {stream:#x}, and {self._backend} cannot wait for "
                "streams: synchronise it and give no stream, or take a backend on the GPU"
            )
        return frame

    def close(self) -> None:
        """Ends the worker's thread after the batches that it has."""
        self._worker.shutdown()
