"""The interface of a backend: two stages, each of which maps named arrays to named arrays."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from comask.config import PreprocessConfig
from comask.errors import EngineError, is_out_of_memory
from comask.preprocess import Placement
from comask.runtime.lanes import HostLanes, Lanes
from comask.structures import Detections, require_finite

Array = NDArray[Any]

PROPOSALS = ("proposals", "proposal_scores")  # stage 1's outputs for stage 2 besides the pyramid


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph's input or output.

    Attributes:
        name: the tensor's name.
        dtype: the type of its elements.
        shape: the size of each dimension; a string stands for a dynamic one.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


class Stage(Protocol):
    """One stage, ready to run. Several threads may call it at once."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` expects."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` returns."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the stage and returns its outputs by name; the arrays belong to the caller."""

    def close(self) -> None:
        """Frees the stage's resources; it cannot run afterwards."""


class Closing:
    """Base class: leaving the `with` block calls `close()`."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the object's resources."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Stages(Closing):
    """Both stages of one backend.

    Attributes:
        backend: its name, as on the command line.
        stage1: images → pyramid and proposals.
        stage2: pyramid and proposals → detections.
        largest_batch: the number of images that may run together; None for any number.
        proposals: the number of an image's best proposals that stage 2 takes; None for all.
        device: the device that runs them: `cpu`, or `cuda:0` for the first GPU.
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
        """Runs stage 1, then stage 2 on stage 1's outputs.

        Args:
            images: u8 [B, H, W, 3] in RGB.
            image_sizes: i32 [B, 2], (h, w) of each image on the canvas.
            seconds: receives the seconds that `stage1` and `stage2` took, if given.

        Returns:
            stage 2's outputs by name; the arrays belong to the caller.

        Raises:
            EngineError: if memory runs out.
            NotFiniteError: if the proposals are not finite.
        """
        started = time.perf_counter()
        try:
            features = self.stage1.run({"images": images, "image_sizes": image_sizes})
            between = time.perf_counter()
            # sorted by falling score
            best = {name: features[name][:, : self.proposals] for name in PROPOSALS}
            for name, values in best.items():
                # an error here names the stage; stage 2 would only report its own scores
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
        """Index of the GPU in whose memory frames may lie; None if they must be in the host's memory."""
        return None

    def lanes(self, count: int, *, graphs: bool) -> Lanes:
        """Creates the lanes that run a `StreamSession`'s batches; these call `run`, batch after batch.

        Args:
            count: the number of batches that may be in progress at once.
            graphs: whether to capture and replay CUDA graphs, if the backend can.
        """
        return HostLanes(self.backend, self.run, count)

    @override
    def close(self) -> None:
        self.stage1.close()
        self.stage2.close()


class FramePredictor(Protocol):
    """The part of a `Predictor` that its `StreamSession` needs."""

    stages: Stages
    preprocess: PreprocessConfig
    mask_threshold: float
    max_batch: int

    def detections(
        self, outputs: Mapping[str, Array], placements: Sequence[Placement]
    ) -> list[Detections]:
        """Returns the detections of each image; see `Predictor.detections`."""
