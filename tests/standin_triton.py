"""A stand-in for the `triton_python_backend_utils` that Triton's Python backend gives to its models.

Its server runs a repository's stages by ONNX Runtime. As on a GPU, what a stage leaves where it was
computed cannot be read from the host, and an array is no longer good when its tensor is gone. What
stage 1 gives for a white image is not finite.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from comask.runtime.backends.ort import OrtSession

TRITONSERVER_MEMORY_CPU, TRITONSERVER_MEMORY_GPU = "CPU", "GPU"
repository: Path  # set by `serve`
largest_canvas: int  # pixels that stage 1 takes
has_gpu = True
sessions: dict[str, OrtSession] = {}
batches: list[int] = []  # that stage 1 ran


def serve(folder: Path, largest: int = 10**9) -> None:
    global repository, largest_canvas
    repository, largest_canvas = folder, largest
    sessions.clear()
    batches.clear()


class Tensor:
    def __init__(self, name: str, array: np.ndarray, *, on_gpu: bool = False) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array, self._on_gpu = name, array, on_gpu

    def name(self) -> str:
        return self._name

    def is_cpu(self) -> bool:
        return not self._on_gpu

    def as_numpy(self) -> np.ndarray:
        assert not self._on_gpu, f"{self._name} is stored in GPU and cannot be converted to NumPy"
        return self._array


def _of_server(name: str, array: np.ndarray, on_gpu: bool) -> Tensor:
    tensor = Tensor(name, array, on_gpu=on_gpu)
    weakref.finalize(tensor, array.fill, 99)  # the memory has another use by then
    return tensor


class TritonError:
    INVALID_ARG, INTERNAL = "invalid argument", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


def PreferredMemory(kind: str, device: int = 0) -> SimpleNamespace:  # noqa: N802, as Triton's
    return SimpleNamespace(kind=kind, device=device)


class InferenceRequest:
    def __init__(
        self,
        *,
        inputs: list[Tensor],
        requested_output_names: list[str],
        model_name: str = "",
        preferred_memory: SimpleNamespace | None = None,
    ) -> None:
        self._model, self._wanted, self._inputs = model_name, requested_output_names, inputs
        self._on_gpu = has_gpu and preferred_memory is None

    def requested_output_names(self) -> set[str]:
        return set(self._wanted)

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def exec(self) -> InferenceResponse:
        feeds = {tensor.name(): tensor._array for tensor in self._inputs}
        if "images" in feeds:
            batches.append(len(feeds["images"]))
            if feeds["images"][0].size // 3 > largest_canvas:
                return InferenceResponse(error=TritonError("unexpected shape for input 'images'"))
        if self._model not in sessions:
            sessions[self._model] = OrtSession(repository / self._model / "1" / "model.onnx", "cpu")
        found = sessions[self._model].run(feeds)
        if "images" in feeds:
            for row, (height, width) in enumerate(feeds["image_sizes"]):
                if feeds["images"][row, :height, :width].min() == 255:
                    for name in found.keys() - {"proposals"}:  # a RoIAlign may refuse those
                        found[name][row] = np.nan
        if "num_detections" in found:  # by the configuration's `reshape`
            found["num_detections"] = found["num_detections"][:, None]
        return InferenceResponse(
            [_of_server(name, found[name], self._on_gpu) for name in self._wanted]
        )


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)
