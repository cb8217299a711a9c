"""What a backend is: two stages, each of which maps named arrays to named arrays."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig
from comask.errors import EngineError, is_out_of_memory
from comask.preprocess import Placement
from comask.runtime.lanes import HostLanes, Lanes
from comask.structures import Detections, require_finite

Array = NDArray[Any]

PROPOSALS = ("proposals", "proposal_scores")  # what stage 1 tells stage 2 besides the pyramid


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph's input or output.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        shape: sizes; a dynamic dimension is a string.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


class Stage(Protocol):
    """One stage, ready to run. May be called from several threads at once."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` expects."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; the arrays belong to the caller."""

    def close(self) -> None:
        """Frees what it holds; running it afterwards is an error."""


class Closing:
    """What `with` closes at its end."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees what is held."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Stages(Closing):
    """Both stages of one backend.

    Attributes:
        backend: its name, as the command line writes it.
        stage1: images → pyramid and proposals.
        stage2: pyramid and proposals → detections.
        largest_batch: images that may run together; None for any number.
        proposals: of an image's, stage 2 takes so many of the best; None for all.
        device: that runs them, `cpu`, or `cuda:0` for the first GPU.
    """

    backend: str
    stage1: Stage
    stage2: Stage
    largest_batch: int | None = None
    proposals: int | None = None
    device: str = "cpu"

    def run(
        self, images: Array, image_sizes: Array, *, seconds: dict[str, float] | None = None
    ) -> dict[str, Array]:
        """Runs stage 1 and then stage 2 on what it gave.

        Args:
            images: u8 [B, H, W, 3] in RGB.
            image_sizes: i32 [B, 2], (h, w) of each image on the canvas.
            seconds: is told how long `stage1` and `stage2` took, where given.

        Returns:
            stage 2's outputs by name; the arrays belong to the caller.

        Raises:
            EngineError: there is not enough memory.
            NotFiniteError: the proposals are not finite.
        """
        started = time.perf_counter()
        try:
            features = self.stage1.run({"images": images, "image_sizes": image_sizes})
            between = time.perf_counter()
            # sorted by falling score
            best = {name: features[name][:, : self.proposals] for name in PROPOSALS}
            for name, values in best.items():
                # stage 2 would take these for padding, and find nothing
                require_finite(f"{self.backend}: stage 1's {name}", values)
            outputs = self.stage2.run({**features, **best, "image_sizes": image_sizes})
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            batch, height, width, _ = images.shape
            raise EngineError(
                f"{self.backend}: there is no memory for {batch} of {height}x{width} pixels on "
                f"{self.device}: take a smaller batch or short side"
            ) from error
        if seconds is not None:
            seconds |= {"stage1": between - started, "stage2": time.perf_counter() - between}
        return outputs

    @property
    def gpu(self) -> int | None:
        """Index of the GPU whose memory `lanes` read frames in too; None where the host's alone."""
        return None

    def lanes(self, count: int, *, graphs: bool) -> Lanes:
        """Where a `StreamSession` runs its batches; here by `run`, one after the other.

        Args:
            count: of batches that may be on their way at once.
            graphs: whether CUDA graphs are captured and replayed, where the backend can.
        """
        return HostLanes(self.backend, self.run, count)

    def close(self) -> None:
        """Closes both."""
        self.stage1.close()
        self.stage2.close()


class FramePredictor(Protocol):
    """What a `StreamSession` needs of the `Predictor` that made it."""

    stages: Stages
    preprocess: PreprocessConfig
    mask_threshold: float
    max_batch: int

    def detections(
        self, outputs: Mapping[str, Array], placements: Sequence[Placement]
    ) -> list[Detections]:
        """See `Predictor.detections`."""
