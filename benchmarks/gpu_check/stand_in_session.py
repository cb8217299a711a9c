"""Loads the stand-in TensorRT's engines, whose memory and streams are the GPU's, and a reference.

The stand-in runs a bundle's graphs by ONNX Runtime on the CPU. Everything else is ours and real:
contexts, lanes, events, captured graphs, borrowed frames and shared outputs. Results must therefore equal
those of the onnxruntime backend on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from context import Context

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from comask.config import PreprocessConfig
    from comask.preprocess import Prepared
    from comask.runtime import Predictor
    from comask.runtime.dlpack import SharedArray
    from comask.structures import Detections

SIZES = ((96, 128), (128, 96), (64, 64))  # of one picture each; the first is the stream's
ALIKE = 0.01  # pixels, or percent of scores and of mask probabilities


def drawn(size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Returns a picture of discs and squares on noise, which the demo network detects: u8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    height, width = size
    image = rng.normal(120, 12, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    for place in range(3):
        colour, radius = rng.uniform(0, 255, 3), rng.uniform(10, 18)
        dy, dx = np.abs(y - rng.uniform(20, height - 20)), np.abs(x - rng.uniform(20, width - 20))
        inside = np.hypot(dy, dx) < radius if place % 2 else np.maximum(dy, dx) < radius
        image[inside] = colour
    return image.clip(0, 255).astype(np.uint8)


PICTURES = [drawn(SIZES[0], seed) for seed in range(3)]


@dataclass
class Loaded:
    """A predictor on the stand-in TensorRT, and the reference.

    Attributes:
        predictor: the predictor under test.
        reference: the same bundle in ONNX Runtime on the CPU.
    """

    predictor: Predictor
    reference: Predictor

    def expected(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Returns the reference's detections in frames of one canvas, which run as a batch."""
        found = self.reference.predict_prepared(
            [prepared(f, self.reference.preprocess) for f in frames]
        )
        if not sum(map(len, found)):
            raise RuntimeError("the reference detects nothing, so nothing can be compared")
        return found

    def run(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Runs frames on the contexts of calls."""
        return self.predictor.predict_prepared(
            [prepared(f, self.predictor.preprocess) for f in frames]
        )


@functools.cache
def loaded(folder: Path) -> Loaded:
    """Returns what all rows of a process share; `folder` is that of the checks."""
    return load(folder)


def load(folder: Path) -> Loaded:
    """Writes the stand-in's engines to a copy of the trained bundle, and loads it."""
    from standin_engines import write_engines

    from comask.runtime import Predictor

    bundle = folder / "stand-in-bundle"
    if not bundle.exists():
        shutil.copytree(folder / "trained-bundle", bundle)
    write_engines(bundle)
    reference = Predictor.load(bundle, "onnxruntime", device="cpu")
    return Loaded(Predictor.load(bundle, "tensorrt"), reference)


def the(context: Context) -> Loaded:
    """Returns what all rows of this process share."""
    return loaded(context.folder)


def prepared(frame: NDArray[np.uint8], preprocess: PreprocessConfig) -> Prepared:
    """Does what `comask.preprocess.prepare` does without OpenCV, by the kernel's CPU build."""
    from comask.kernels import run
    from comask.kernels.launch import rgb_to_canvas_launch
    from comask.preprocess import Prepared, padded_shape, resized_shape

    size = (frame.shape[0], frame.shape[1])
    resized = resized_shape(size, preprocess)
    shape = padded_shape(resized, preprocess)
    frame, canvas = np.ascontiguousarray(frame), np.empty((*shape, 3), np.uint8)
    launch = rgb_to_canvas_launch(size, frame.strides, resized, shape)
    run.on_host(launch, [frame.ctypes.data], canvas.ctypes.data)
    return Prepared(resized, size, canvas)


def distance(one: Detections, other: Detections) -> float:
    """Returns the largest difference: boxes in pixels, scores and mask probabilities in percent."""
    if one.labels.tolist() != other.labels.tolist():
        return math.inf
    units = {"boxes_xyxy": 1, "scores": 100, "mask_probs": 100}
    return max(
        unit * float(np.abs(getattr(one, name) - getattr(other, name)).max(initial=0.0))
        for name, unit in units.items()
    )


class OwnFrame:
    """A frame in memory of ours on the GPU, written on a stream of ours.

    Args:
        image: u8 [h, w, 3], or a plane.
        interface: `dlpack`, or `cai` for `__cuda_array_interface__` alone.
    """

    def __init__(self, image: NDArray[np.uint8], interface: str = "cai") -> None:
        from comask.runtime.device import open_device

        self.device, self.shape = open_device(), image.shape
        with self.device:
            self.memory = self.device.memory(image.nbytes)
        self.write(image)
        if interface == "dlpack":
            self.__dlpack__ = self._shared().__dlpack__
            self.__dlpack_device__ = self._shared().__dlpack_device__
        else:
            self.__cuda_array_interface__ = self._interface()

    def write(self, image: NDArray[np.uint8]) -> None:
        """Writes the pixels and waits."""
        with self.device:
            stream = self.device.stream()
            stream.copy_in(self.memory, np.ascontiguousarray(image))
            stream.close()

    def _interface(self) -> dict[str, Any]:
        address = (self.memory.address, False)
        return {
            "shape": self.shape,
            "typestr": "|u1",
            "data": address,
            "version": 3,
            "strides": None,
        }

    def _shared(self) -> SharedArray:
        from comask.runtime.dlpack import SharedArray

        owner: Any = _Written(self)
        return SharedArray(self.memory.address, self.shape, np.dtype(np.uint8), 0, owner)

    def __del__(self) -> None:
        with self.device:
            self.memory.free()


class _Written:
    """Owns memory that is already written."""

    def __init__(self, frame: OwnFrame) -> None:
        self._frame_memory = frame.memory

    def share(self, stream: int | None) -> None:
        """Does nothing."""


@contextmanager
def launches() -> Iterator[list[int]]:
    """Counts the launches of CUDA graphs in this block, in the list's only element."""
    from comask.runtime.device import Graph

    count, launch = [0], Graph.launch

    def counted(self: Graph, stream: Any) -> None:
        count[0] += 1
        launch(self, stream)

    Graph.launch = counted  # type: ignore[method-assign]
    try:
        yield count
    finally:
        Graph.launch = launch  # type: ignore[method-assign]


def on_host(shared: SharedArray) -> NDArray[Any]:
    """Copies an output on the stream that its `__cuda_array_interface__` names, by the driver alone."""
    from comask.runtime.device import open_device

    interface = shared.__cuda_array_interface__
    array = np.zeros(interface["shape"], interface["typestr"])
    driver, stream = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(interface["stream"])
    with open_device():
        status = driver.cuMemcpyDtoHAsync_v2(
            ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(interface["data"][0]),
            ctypes.c_size_t(array.nbytes), stream,
        )  # fmt: skip
        status = status or driver.cuStreamSynchronize(stream)
    if status:
        raise RuntimeError(f"the copy failed with {status}")
    return array


def require_clean() -> None:
    """Raises RuntimeError if anything went wrong in a callback, a destructor or the worker."""
    import standin_tensorrt
    import standin_worker

    if found := standin_tensorrt.failures + standin_worker.errors():
        raise RuntimeError("; ".join(found))
