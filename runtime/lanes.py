"""Where a `StreamSession` runs its batches: lanes, one batch at a time each; here those of the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig
from comask.errors import ImageError
from comask.kernels.launch import Size
from comask.preprocess import Placement, padded_shape, prepare, resized_shape
from comask.runtime.dlpack import UNORDERED, HostMemory, SharedArray
from comask.runtime.frames import Coding, Frame, borrow_frame
from comask.segmentation import Integers, rles_from_edges
from comask.structures import Detections, detections_from_outputs

Outputs: TypeAlias = dict[str, NDArray[Any]]  # stage 2's, by name
Edges: TypeAlias = tuple[Integers, Integers]  # edge_counts and edges, see `comask.segmentation`


@dataclass(eq=False)
class Batch:
    """Frames of one canvas that run together, and what becomes of them.

    Attributes:
        frames: in the caller's memory.
        preprocess: resize and padding.
        mask_threshold: a pixel belongs to a mask when its probability is at least this.
        rle: whether the edges of masks are to be found where the masks are.
        placements: where each frame lies on its canvas, to map detections back.
        canvas: (H, W) in pixels.
        lane: that runs it or ran it; None while it waits for one.
        kept: what that lane keeps of it: on the host its work, on a GPU where its outputs lie.
        outputs: stage 2's on the host, once they were fetched; they belong to the caller.
        edges: of each frame's masks, all D of them; None where the lane finds none.
        error: that it ended with.

    Raises:
        ImageError: the frames need different canvases.
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
        """Whether it has come to its end: its outputs are on the host, or it failed."""
        return self.outputs is not None or self.error is not None

    def release(self) -> None:
        """Lets go of the caller's memory."""
        for frame in self.frames:
            frame.release()

    def with_rles(self, found: list[Detections]) -> list[Detections]:
        """The detections of each frame with the RLEs of their masks."""
        if self.edges is None:
            rles = [detections.to_rle() for detections in found]
        else:
            rles = [
                rles_from_edges(counts[: len(detections)], edges, detections.image_size)
                for detections, (counts, edges) in zip(found, self.edges, strict=True)
            ]
        return [d.with_rles(r) for d, r in zip(found, rles, strict=True)]


class Lane(Protocol):
    """Runs one batch at a time. What it is asked of a batch holds for those that it started."""

    def suits(self, batch: Batch) -> bool:
        """Whether the last batch had the same shapes, so that all is ready for this one."""

    def start(self, batch: Batch) -> None:
        """Begins; the batch before must be done.

        Raises:
            ComaskError: it cannot; the lane is free again.
        """

    def wait(self, batch: Batch, seconds: float | None) -> bool:
        """Waits for the batch, at most so long; whether it is done."""

    def release_read(self) -> None:
        """Lets go of the caller's frames if they have been read."""

    def fetch(self, batch: Batch) -> tuple[Outputs, list[Edges] | None]:
        """`outputs` and `edges` of the last batch, when it is done.

        Raises:
            Exception: what went wrong with the batch.
        """

    def outputs(self, batch: Batch) -> dict[str, SharedArray]:
        """See `Future.outputs`."""

    def bitmaps(self, batch: Batch, place: int) -> SharedArray:
        """See `Future.bitmaps`."""

    def wait_on(self, batch: Batch, stream: int) -> None:
        """See `Future.wait_on`."""

    def wait_read(self, batch: Batch, stream: int) -> None:
        """See `Future.wait_read`."""


class Lanes(Protocol):
    """All lanes of one session."""

    @property
    def lanes(self) -> Sequence[Lane]:
        """Each of them."""

    def borrow(self, source: Any, stream: int | None, coding: Coding) -> Frame:
        """A frame that all batches started from now on may read.

        Args:
            source: see `borrow_frame`.
            stream: handle of the caller's stream that writes it; None to have the producer say.
            coding: of its bytes.

        Raises:
            ImageError: it is no frame, or lies where this backend cannot read it.
            EngineError: the stream is none.
        """

    def close(self) -> None:
        """Frees all; their batches must be done."""


class HostLane:
    """Runs batches by a backend that reads and writes the host's memory, in the worker's thread.

    Args:
        run: see `Stages.run`.
        worker: of all lanes.
    """

    def __init__(self, run: Callable[..., Outputs], worker: futures.Executor) -> None:
        self._run, self._worker = run, worker

    def suits(self, batch: Batch) -> bool:
        """See `Lane`."""
        return True

    def start(self, batch: Batch) -> None:
        """See `Lane`; the frames have been read when it returns."""
        try:
            prepared = [prepare(frame.pixels(), batch.preprocess) for frame in batch.frames]
        finally:
            batch.release()
        images = np.stack([image.canvas for image in prepared])
        sizes = np.array([image.size for image in prepared], np.int32)
        batch.kept = self._worker.submit(self._run, images, sizes)

    def wait(self, batch: Batch, seconds: float | None) -> bool:
        """See `Lane`."""
        return bool(futures.wait([batch.kept], seconds).done)

    def release_read(self) -> None:
        """See `Lane`."""

    def fetch(self, batch: Batch) -> tuple[Outputs, None]:
        """See `Lane`."""
        return batch.kept.result(), None

    def outputs(self, batch: Batch) -> dict[str, SharedArray]:
        """See `Lane`; they are there for good."""
        return HostMemory(batch.kept.result()).shared()

    def bitmaps(self, batch: Batch, place: int) -> SharedArray:
        """See `Lane`."""
        outputs = batch.kept.result()
        found = detections_from_outputs(
            outputs, batch.placements, mask_threshold=batch.mask_threshold
        )[place]
        bitmaps = np.zeros((outputs["boxes"].shape[1], *found.image_size), np.uint8)
        bitmaps[: len(found)] = found.masks
        return HostMemory({"bitmaps": bitmaps}).shared()["bitmaps"]

    def wait_on(self, batch: Batch, stream: int) -> None:
        """See `Lane`."""
        self.wait(batch, None)

    def wait_read(self, batch: Batch, stream: int) -> None:
        """See `Lane`."""


class HostLanes:
    """Lanes that one thread runs, batch after batch: the backend has threads of its own.

    Args:
        backend: its name.
        run: see `Stages.run`.
        count: how many.
    """

    def __init__(self, backend: str, run: Callable[..., Outputs], count: int) -> None:
        self._backend = backend
        self._worker = futures.ThreadPoolExecutor(1, "comask")
        self.lanes: Sequence[Lane] = [HostLane(run, self._worker) for _ in range(count)]

    def borrow(self, source: Any, stream: int | None, coding: Coding) -> Frame:
        """See `Lanes`."""
        frame = borrow_frame(source, UNORDERED, coding)
        if frame.device is not None:
            raise ImageError(
                f"a frame is on GPU {frame.device}, and {self._backend} reads the host's memory: "
                "copy it there, or take a tensorrt backend"
            )
        if stream is not None:
            raise ImageError(
                f"a frame is written on CUDA stream {stream:#x}, and {self._backend} waits for "
                "none: synchronise it and give no stream, or take a tensorrt backend"
            )
        return frame

    def close(self) -> None:
        """See `Lanes`."""
        self._worker.shutdown()
