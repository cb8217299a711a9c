"""The model that a Triton server shows to clients: images in, detections and RLE masks out.

Triton's Python backend finds it through the repository's `model.py`. Images are prepared, put together
in batches and their detections read by `comask.runtime`, as everywhere; the two stages of the network
are models of the same server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from comask.bundle import MANIFEST, STAGES, Manifest
from comask.errors import ComaskError, EngineError, ImageError
from comask.preprocess import Prepared, decode_image
from comask.runtime.backends.base import PROPOSALS, Array, Stages
from comask.runtime.predictor import Predictor
from comask.runtime.triton_tensors import (
    IMAGE,
    PIXELS,
    TEXT,
    client_outputs,
    graph_tensors,
    stage_name,
)
from comask.structures import Detections, require_finite


class ServerSession:
    """One stage, which is a model of the server.

    Args:
        model: the model that clients see.
        stage: `stage1` or `stage2`.
        manifest: of the bundle.
        precision: of the stage.
    """

    def __init__(self, model: str, stage: str, manifest: Manifest, precision: str) -> None:
        self.name = stage_name(model, stage)
        self.inputs, self.outputs = graph_tensors(manifest, stage, precision)

    def infer(self, tensors: Sequence[Any], **options: Any) -> list[Any]:
        """Runs it on the server's tensors; its outputs are such too, where the stage left them.

        Raises:
            EngineError: the server refuses, or fails.
        """
        request = pb_utils.InferenceRequest(
            model_name=self.name,
            requested_output_names=[spec.name for spec in self.outputs],
            inputs=list(tensors),
            **options,
        )
        response = request.exec()
        if response.has_error():
            raise EngineError(f"{self.name}: {response.error().message()}")
        return list(response.output_tensors())

    def infer_on_host(self, tensors: Sequence[Any]) -> dict[str, Array]:
        """The same with the outputs as arrays."""
        host = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
        found = self.infer(tensors, preferred_memory=host)
        # a tensor's array is the server's memory, which goes with the tensor
        return {tensor.name(): np.array(tensor.as_numpy()) for tensor in found}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Stage`."""
        return self.infer_on_host([pb_utils.Tensor(name, feed) for name, feed in feeds.items()])

    def close(self) -> None:
        """Nothing of its own."""


@dataclass(frozen=True, slots=True)
class ServerStages(Stages):
    """Both stages; what the first one leaves on a GPU, the second one takes from there."""

    stage1: ServerSession
    stage2: ServerSession

    def run(
        self, images: Array, image_sizes: Array, *, seconds: dict[str, float] | None = None
    ) -> dict[str, Array]:
        """See `Stages`; the server itself measures `seconds`."""
        sizes = pb_utils.Tensor("image_sizes", image_sizes)
        features = self.stage1.infer([pb_utils.Tensor("images", images), sizes])
        for tensor in features:
            if tensor.name() in PROPOSALS and tensor.is_cpu():
                require_finite(f"{self.stage1.name}'s {tensor.name()}", tensor.as_numpy())
        outputs = self.stage2.infer_on_host([*features, sizes])
        # clients and Triton's configuration have no [B]
        return outputs | {"num_detections": outputs["num_detections"].reshape(-1)}


class TritonPythonModel:
    """What Triton's Python backend looks for; it calls the methods, one at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the manifest that lies beside `model.py`."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"))
        backend = config["parameters"]["backend"]["string_value"]
        stage1, stage2 = (
            ServerSession(args["model_name"], stage, manifest, backend.partition(":")[2])
            for stage in STAGES
        )
        self._predictor = Predictor(
            ServerStages(f"triton {backend}", stage1, stage2),
            manifest.preprocess,
            class_names=tuple(category.name for category in manifest.categories),
            category_ids=tuple(category.id for category in manifest.categories),
            mask_threshold=manifest.mask_threshold,
            max_batch=config["max_batch_size"],
        )
        self._outputs = client_outputs(manifest)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request; images of one canvas share batches, whoever sent them."""
        asked = [self._images(request) for request in requests]
        found = iter(
            self._predict([i for images in asked for i in images if isinstance(i, Prepared)])
        )
        return [
            self._response(request, [next(found) if isinstance(i, Prepared) else i for i in images])
            for request, images in zip(requests, asked, strict=True)
        ]

    def _images(self, request: Any) -> list[Prepared | ComaskError]:
        """A request's images, or why one is none."""
        encoded = pb_utils.get_input_tensor_by_name(request, IMAGE)
        pixels = pb_utils.get_input_tensor_by_name(request, PIXELS)
        if (encoded is None) == (pixels is None):
            got = "neither" if encoded is None else "both"
            return [ImageError(f"expected one of the inputs {IMAGE} and {PIXELS}, got {got}")]
        sources = encoded.as_numpy().ravel() if pixels is None else pixels.as_numpy()
        return [self._prepared(source) for source in sources]

    def _prepared(self, source: bytes | Array) -> Prepared | ComaskError:
        try:
            array = decode_image(source) if isinstance(source, bytes) else source
            return self._predictor.prepare(array)
        except ImageError as error:
            return error

    def _predict(self, images: Sequence[Prepared]) -> list[Detections | ComaskError]:
        """What was found in each image; if not all can be run together, each one is run alone."""
        try:
            return list(self._predictor.predict_prepared(images))
        except EngineError as error:
            if len(images) == 1:
                return [error]
            return [result for image in images for result in self._predict([image])]

    def _response(self, request: Any, results: Sequence[Detections | ComaskError]) -> Any:
        errors = [result for result in results if isinstance(result, ComaskError)]
        if len(errors) == len(results):  # so that whoever asks for one image cannot overlook it
            text = "; ".join(dict.fromkeys(map(str, errors)))
            bad_input = all(isinstance(error, ImageError) for error in errors)
            code = pb_utils.TritonError.INVALID_ARG if bad_input else pb_utils.TritonError.INTERNAL
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))
        wanted = request.requested_output_names()
        tensors = []
        for spec in self._outputs:
            if spec.name not in wanted:
                continue
            empty = b"" if spec.dtype == TEXT else 0
            array = np.full((len(results), *map(int, spec.shape)), empty, spec.dtype)
            for row, result in zip(array, results, strict=True):
                if len(values := _values(spec.name, result)):
                    row[: len(values)] = values
            tensors.append(pb_utils.Tensor(spec.name, array))
        return pb_utils.InferenceResponse(tensors)


def _values(output: str, result: Detections | ComaskError) -> Sequence[Any] | Array:
    """The rows of one output of one image; what follows them is padding."""
    if isinstance(result, ComaskError):
        return [str(result).encode()] if output == "error" else []
    match output:
        case "num_detections":
            return [len(result)]
        case "boxes":
            return result.boxes_xyxy
        case "scores":
            return result.scores
        case "labels":
            return result.labels
        case "category_ids":
            assert result.category_ids is not None  # the manifest has them
            return [result.category_ids[label] for label in result.labels]
        case "class_names":
            return [result.name(int(label)).encode() for label in result.labels]
        case "rle_counts":
            return [rle["counts"].encode() for rle in result.to_rle()]
        case "image_size":
            return result.image_size
    return []
