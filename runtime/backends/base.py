"""The interface of a backend: two stages, each of which maps named arrays to named arrays."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from comask.config import PreprocessConfig
from comask.errors import EngineError, is_out_of_memory
from comask.kernels.launch import LEVEL_STRIDES
from comask.preprocess import Placement
from comask.runtime.lanes import HostLanes, Lanes
from comask.runtime.resident import Memory, ResidentLanes
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

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """Runs the stage.

        Args:
            feeds: the inputs by name: arrays, or what a stage of the same backend kept on the device.
            keep: names of the outputs that may stay on the backend's device.

        Returns:
            the outputs by name. Those in `keep` may be the backend's own objects, which only its stages
            and its `Memory` take; all others are arrays that belong to the caller.
        """

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
        memory: the backend's memory on that GPU; None on a CPU, or without kernels for frames and masks.
    """

    backend: str
    stage1: Stage
    stage2: Stage
    largest_batch: int | None = None
    proposals: int | None = None
    device: str = "cpu"
    memory: Memory | None = None

    def run(
        self,
        images: Any,
        image_sizes: Array,
        *,
        seconds: dict[str, float] | None = None,
        keep: Collection[str] = (),
    ) -> dict[str, Any]:
        """Runs stage 1, then stage 2 on stage 1's outputs; the pyramid stays on the device between them.

        Args:
            images: u8 [B, H, W, 3] in RGB; an array, or an object of the backend's `Memory`.
            image_sizes: i32 [B, 2], (h, w) of each image on the canvas.
            seconds: receives the seconds that `stage1` and `stage2` took, if given.
            keep: see `Stage.run`.

        Returns:
            stage 2's outputs by name.

        Raises:
            EngineError: if memory runs out.
            NotFiniteError: if the proposals are not finite.
        """
        started = time.perf_counter()
        try:
            inputs = {"images": images, "image_sizes": image_sizes}
            features = self.stage1.run(inputs, keep=LEVEL_STRIDES)
            between = time.perf_counter()
            # sorted by falling score
            best = {name: features[name][:, : self.proposals] for name in PROPOSALS}
            for name, values in best.items():
                # an error here names the stage; stage 2 would only report its own scores
                require_finite(f"{self.backend}: stage 1's {name}", values)
            outputs = self.stage2.run({**features, **best, "image_sizes": image_sizes}, keep=keep)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shape = images.shape() if callable(images.shape) else images.shape
            batch, height, width, _ = shape
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
        return self.memory.gpu if self.memory else None

    def lanes(self, count: int, *, graphs: bool) -> Lanes:
        """Creates the lanes that run a `StreamSession`'s batches; these call `run`, batch after batch.

        Args:
            count: the number of batches that may be in progress at once.
            graphs: whether to capture and replay CUDA graphs, if the backend can.
        """
        if self.memory is not None:
            return ResidentLanes(self.backend, self.run, self.memory, count)
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
