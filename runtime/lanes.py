"""Where a `StreamSession` runs its batches: lanes, one batch at a time each; here those of the host."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig
from comask.errors import ImageError
from comask.kernels.launch_frames import Matrix, Size
from comask.postprocess import detections_from_outputs
from comask.preprocess import Prepared, padded_shape, prepare, resized_shape
from comask.runtime.dlpack import UNORDERED, HostMemory, SharedArray
from comask.runtime.frames import Format, Frame, borrow_frame
from comask.segmentation import Integers, rles_from_edges
from comask.structures import Detections

Edges: TypeAlias = tuple[Integers, Integers]  # edge_counts and edges, see `comask.segmentation`


@dataclass(frozen=True)
class Batch:
    """Frames of one canvas that run together.

    Attributes:
        frames: in the caller's memory.
        preprocess: resize and padding.
        mask_threshold: a pixel belongs to a mask when its probability is at least this.
        rle: whether the edges of masks are to be found where the masks are.
    """

    frames: tuple[Frame, ...]
    preprocess: PreprocessConfig
    mask_threshold: float
    rle: bool

    def __post_init__(self) -> None:
        """Raises ImageError where the frames need different canvases."""
        assert self.canvas

    @property
    def sizes(self) -> list[Size]:
        """(h, w) of each resized frame."""
        return [resized_shape(frame.size, self.preprocess) for frame in self.frames]

    @property
    def canvas(self) -> Size:
        """(H, W) of the canvas.

        Raises:
            ImageError: the frames need different ones.
        """
        canvases = {padded_shape(size, self.preprocess) for size in self.sizes}
        if len(canvases) != 1:
            raise ImageError(
                f"a batch of frames needs canvases of {sorted(canvases)}; expected one for all: submit "
                "frames of another size on their own"
            )
        return canvases.pop()

    def places(self) -> list[Prepared]:
        """The frames' sizes, to map detections back; without canvases, which may be on the GPU."""
        none = np.empty((0, 0, 3), np.uint8)
        return [
            Prepared(none, size, frame.size)
            for frame, size in zip(self.frames, self.sizes, strict=True)
        ]

    def release(self) -> None:
        """Lets go of the caller's memory."""
        for frame in self.frames:
            frame.release()


@dataclass(frozen=True)
class Fetched:
    """What a batch gave, on the host; it belongs to the caller.

    Attributes:
        outputs: stage 2's.
        edges: of each frame's masks, all D of them; None where nothing was found but on the host.
    """

    outputs: dict[str, NDArray[Any]]
    edges: list[Edges] | None

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


class Loan(Protocol):
    """A batch in its lane, and its outputs where they are until the lane starts the next one."""

    def wait(self, seconds: float | None) -> bool:
        """Waits for the batch, at most so long; whether it is done."""

    def wait_on(self, stream: int) -> None:
        """See `Future.wait_on`."""

    def wait_read(self, stream: int) -> None:
        """See `Future.wait_read`."""

    def outputs(self) -> dict[str, SharedArray]:
        """Stage 2's, by name."""

    def bitmaps(self, place: int) -> SharedArray:
        """u8 [D, h, w], the masks of the frame at a place, see `Future.bitmaps`."""


class Lane(Protocol):
    """Runs one batch at a time."""

    def suits(self, batch: Batch) -> bool:
        """Whether the last batch had the same shapes, so that all is ready for this one."""

    def start(self, batch: Batch) -> None:
        """Begins; the batch before must be past.

        Raises:
            ComaskError: it cannot; the lane is free again.
        """

    def past(self) -> bool:
        """Whether the last batch is done."""

    def release_read(self) -> None:
        """Lets go of the caller's frames if they have been read."""

    def loan(self) -> Loan:
        """The last batch."""

    def fetch(self) -> Fetched:
        """The last batch's outputs on the host, when they are done.

        Raises:
            Exception: what went wrong with the batch.
        """


class Lanes(Protocol):
    """The lanes of one session."""

    def open(self) -> Sequence[Lane]:
        """All of them."""

    def borrow(
        self, source: Any, stream: int | None, format: Format, matrix: Matrix, full_range: bool
    ) -> Frame:
        """A frame that all batches started from now on may read.

        Args:
            source: see `borrow_frame`.
            stream: handle of the caller's stream that writes it; None to have the producer say.
            format: see `Frame`.
            matrix: see `Frame`.
            full_range: see `Frame`.

        Raises:
            ImageError: it is no frame, or lies where this backend cannot read it.
            EngineError: the stream is none.
        """

    def close(self) -> None:
        """Frees all; their batches must be past."""


class Runner(Protocol):
    """What the host's lanes need of a backend; see `Stages`."""

    @property
    def backend(self) -> str:
        """The name of the backend."""

    def run(self, images: NDArray[Any], image_sizes: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """See `Stages.run`."""


class HostLane:
    """Runs batches by a backend that reads and writes the host's memory, in the worker's thread.

    Args:
        stages: the backend.
        worker: of all lanes.
    """

    def __init__(self, stages: Runner, worker: futures.Executor) -> None:
        self._stages, self._worker = stages, worker
        self._loan: HostLoan | None = None

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
        self._loan = HostLoan(batch, self._worker.submit(self._stages.run, images, sizes))

    def past(self) -> bool:
        """See `Lane`."""
        return self.loan().wait(0)

    def release_read(self) -> None:
        """See `Lane`."""

    def loan(self) -> HostLoan:
        """See `Lane`."""
        assert self._loan is not None
        return self._loan

    def fetch(self) -> Fetched:
        """See `Lane`."""
        return Fetched(self.loan().arrays(), None)


class HostLoan:
    """A batch on the host, whose outputs are there for good.

    Args:
        batch: that runs.
        work: that gives its outputs.
    """

    def __init__(self, batch: Batch, work: futures.Future[dict[str, NDArray[Any]]]) -> None:
        self._batch, self._work = batch, work

    def wait(self, seconds: float | None) -> bool:
        """See `Loan`."""
        return bool(futures.wait([self._work], seconds).done)

    def wait_on(self, stream: int) -> None:
        """See `Loan`."""
        self.wait(None)

    def wait_read(self, stream: int) -> None:
        """See `Loan`."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Stage 2's outputs, when they are done."""
        return self._work.result()

    def outputs(self) -> dict[str, SharedArray]:
        """See `Loan`."""
        return HostMemory(self.arrays()).shared()

    def bitmaps(self, place: int) -> SharedArray:
        """See `Loan`."""
        outputs = self.arrays()
        found = detections_from_outputs(
            outputs, self._batch.places(), mask_threshold=self._batch.mask_threshold
        )[place]
        bitmaps = np.zeros((outputs["boxes"].shape[1], *found.image_size), np.uint8)
        bitmaps[: len(found)] = found.masks
        return HostMemory({"bitmaps": bitmaps}).shared()["bitmaps"]


class HostLanes:
    """Lanes that one thread runs, batch after batch: the backend has threads of its own.

    Args:
        stages: the backend.
        count: how many.
    """

    def __init__(self, stages: Runner, count: int) -> None:
        self._stages = stages
        self._worker = futures.ThreadPoolExecutor(1, "comask")
        self._lanes = [HostLane(stages, self._worker) for _ in range(count)]

    def open(self) -> Sequence[Lane]:
        """See `Lanes`."""
        return self._lanes

    def borrow(
        self, source: Any, stream: int | None, format: Format, matrix: Matrix, full_range: bool
    ) -> Frame:
        """See `Lanes`."""
        frame = borrow_frame(source, UNORDERED, format, matrix, full_range)
        if frame.device is not None:
            raise ImageError(
                f"a frame is on GPU {frame.device}, and {self._stages.backend} reads the host's memory: "
                "copy it there, or take a tensorrt backend"
            )
        if stream is not None:
            raise ImageError(
                f"a frame is written on CUDA stream {stream:#x}, and {self._stages.backend} waits for "
                "none: synchronise it and give no stream, or take a tensorrt backend"
            )
        return frame

    def close(self) -> None:
        """See `Lanes`."""
        self._worker.shutdown()
