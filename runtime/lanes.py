"""Where a `StreamSession` runs its batches: lanes, one batch at a time each; here those of the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from comask.runtime.dlpack import UNORDERED, HostMemory, SharedArray
from comask.runtime.frames import Format, Frame, borrow_frame
from comask.runtime.session import Array, Stages

from comask.config import PreprocessConfig
from comask.errors import ImageError
from comask.kernels.launch_frames import Matrix, Size
from comask.postprocess import detections_from_outputs
from comask.preprocess import Prepared, padded_shape, prepare, resized_shape
from comask.rle import Integers

Edges: TypeAlias = tuple[Integers, Integers]  # edge_counts and edges, see `comask.rle`


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

    outputs: dict[str, Array]
    edges: list[Edges] | None


class Loan(Protocol):
    """A batch's outputs where they are, for other libraries; until its lane starts the next one."""

    def outputs(self) -> dict[str, SharedArray]:
        """Stage 2's, by name."""

    def bitmaps(self, place: int) -> SharedArray:
        """u8 [D, h, w], the masks of the frame at a place, see `Future.bitmaps`."""


class Lane(Protocol):
    """Runs one batch at a time."""

    def start(self, batch: Batch) -> None:
        """Begins; the batch before must be past.

        Raises:
            ComaskError: it cannot; the lane is free again.
        """

    def past(self) -> bool:
        """Whether the last batch is done."""

    def wait(self, seconds: float | None) -> bool:
        """Waits for the last batch, at most so long; whether it is done."""

    def release_read(self) -> None:
        """Lets go of the caller's frames if they have been read."""

    def loan(self) -> Loan:
        """The last batch's outputs where they are."""

    def fetch(self) -> Fetched:
        """The last batch's outputs on the host, when they are done."""

    def hold_back(self, stream: int) -> None:
        """Later work on the caller's stream starts after the last batch."""


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
        """

    def close(self) -> None:
        """Frees all; their batches must be past."""


class HostLane:
    """Runs a backend that reads and writes the host's memory; `start` returns when all is done.

    Args:
        stages: the backend.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._batch: Batch | None = None
        self._outputs: dict[str, Array] = {}

    def start(self, batch: Batch) -> None:
        """See `Lane`."""
        prepared = [prepare(frame.pixels(), batch.preprocess) for frame in batch.frames]
        batch.release()
        self._batch = batch
        sizes = np.array([image.size for image in prepared], np.int32)
        self._outputs = self._stages.run(np.stack([image.canvas for image in prepared]), sizes)

    def past(self) -> bool:
        """See `Lane`."""
        return True

    def wait(self, seconds: float | None) -> bool:
        """See `Lane`."""
        return True

    def release_read(self) -> None:
        """See `Lane`."""

    def loan(self) -> Loan:
        """See `Lane`."""
        assert self._batch is not None
        return HostLoan(self._batch, self._outputs)

    def fetch(self) -> Fetched:
        """See `Lane`."""
        return Fetched(self._outputs, None)

    def hold_back(self, stream: int) -> None:
        """See `Lane`."""


class HostLoan:
    """Outputs on the host, there for good.

    Args:
        batch: whose they are.
        outputs: stage 2's.
    """

    def __init__(self, batch: Batch, outputs: dict[str, Array]) -> None:
        self._batch, self._outputs = batch, outputs
        self._shared = HostMemory(outputs).shared()

    def outputs(self) -> dict[str, SharedArray]:
        """See `Loan`."""
        return self._shared

    def bitmaps(self, place: int) -> SharedArray:
        """See `Loan`."""
        found = detections_from_outputs(
            self._outputs, self._batch.places(), mask_threshold=self._batch.mask_threshold
        )[place]
        bitmaps = np.zeros((self._outputs["boxes"].shape[1], *found.image_size), np.uint8)
        bitmaps[: len(found)] = found.masks
        return HostMemory({"bitmaps": bitmaps}).shared()["bitmaps"]


class HostLanes:
    """One `HostLane`: the backend has threads of its own.

    Args:
        stages: the backend.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def open(self) -> Sequence[Lane]:
        """See `Lanes`."""
        return [HostLane(self._stages)]

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
        return frame

    def close(self) -> None:
        """See `Lanes`."""
