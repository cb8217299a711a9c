"""The model that a Triton server shows to clients: takes images, returns detections and RLE masks.

Triton's Python backend loads it through the repository's `model.py`. As everywhere, `comask.runtime`
prepares the images, groups them in batches and reads the detections; the network's two stages are models
of the same server.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from typing_extensions import override

from comask.bundle import MANIFEST, STAGES, Manifest
from comask.errors import ComaskError, EngineError, ImageError
from comask.preprocess import Prepared, decode_image
from comask.runtime.backends.base import PROPOSALS, Array, Stages
from comask.runtime.predictor import predictor_from_manifest
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
    """One stage, which runs as a model of the server.

    Args:
        model: the name of the model that clients see.
        stage: `stage1` or `stage2`.
        manifest: the bundle's manifest.
        precision: the stage's precision.
    """

    def __init__(self, model: str, stage: str, manifest: Manifest, precision: str) -> None:
        self.name = stage_name(model, stage)
        self.inputs, self.outputs = graph_tensors(manifest, stage, precision)

    def infer(self, tensors: Sequence[Any], **options: Any) -> list[Any]:
        """Runs the stage on the server's tensors and returns such tensors, in the memory it wrote.

        Raises:
            EngineError: if the server refuses the request or fails.
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
        """Runs the stage on the server's tensors and returns its outputs by name, as arrays."""
        host = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
        outputs = self.infer(tensors, preferred_memory=host)
        # a tensor's array is the server's memory, which is freed with the tensor
        return {tensor.name(): np.array(tensor.as_numpy()) for tensor in outputs}

    def run(self, feeds: Mapping[str, Array], keep: Collection[str] = ()) -> dict[str, Array]:
        """Runs the stage and returns all outputs by name; the arrays belong to the caller."""
        return self.infer_on_host([pb_utils.Tensor(name, feed) for name, feed in feeds.items()])

    def close(self) -> None:
        """Does nothing, since the server owns the model."""


@dataclass(frozen=True, slots=True)
class ServerStages(Stages):
    """Both stages; stage 2 reads stage 1's outputs on the GPU if the server left them there."""

    stage1: ServerSession
    stage2: ServerSession

    @override
    def run(
        self,
        images: Array,
        image_sizes: Array,
        *,
        seconds: dict[str, float] | None = None,
        keep: Collection[str] = (),
    ) -> dict[str, Array]:
        # `seconds` is ignored: the server measures them itself
        sizes = pb_utils.Tensor("image_sizes", image_sizes)
        features = self.stage1.infer([pb_utils.Tensor("images", images), sizes])
        for tensor in features:
            if tensor.name() in PROPOSALS and tensor.is_cpu():
                require_finite(f"{self.stage1.name}'s {tensor.name()}", tensor.as_numpy())
        outputs = self.stage2.infer_on_host([*features, sizes])
        # clients and Triton's configuration have no [B]
        return outputs | {"num_detections": outputs["num_detections"].reshape(-1)}


class TritonPythonModel:
    """The class that Triton's Python backend looks for; it calls one method at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the manifest beside `model.py` and prepares a predictor."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"))
        backend = config["parameters"]["backend"]["string_value"]
        stage1, stage2 = (
            ServerSession(args["model_name"], stage, manifest, backend.partition(":")[2])
            for stage in STAGES
        )
        stages = ServerStages(f"triton {backend}", stage1, stage2)
        self._predictor = predictor_from_manifest(stages, manifest, config["max_batch_size"])
        self._outputs = client_outputs(manifest)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Returns a response for each request; images of one canvas share batches across requests."""
        asked = [self._images(request) for request in requests]
        results = iter(
            self._predict([i for images in asked for i in images if isinstance(i, Prepared)])
        )
        return [
            self._response(
                request, [next(results) if isinstance(i, Prepared) else i for i in images]
            )
            for request, images in zip(requests, asked, strict=True)
        ]

    def _images(self, request: Any) -> list[Prepared | ComaskError]:
        """Returns a request's images, each prepared or with its error."""
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
        """Returns the detections in each image; runs them one by one if they cannot run together."""
        try:
            return list(self._predictor.predict_prepared(images))
        except EngineError as error:
            if len(images) == 1:
                return [error]
            return [result for image in images for result in self._predict([image])]

    def _response(self, request: Any, results: Sequence[Detections | ComaskError]) -> Any:
        errors = [result for result in results if isinstance(result, ComaskError)]
        if len(errors) == len(results):  # an error: a client cannot overlook it
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
    """Returns the rows of one output for one image, without the padding that follows them."""
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
