"""A stage in a Triton server without its ONNX Runtime backend: the same file in the same runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from comask.runtime.backends.ort import OrtSession


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        version = Path(args["model_repository"]) / args["model_version"]
        self.session = OrtSession(version / "model.onnx", "cpu")
        self.outputs = {output["name"] for output in json.loads(args["model_config"])["output"]}

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        found = self.session.run(feeds)
        assert set(found) == self.outputs
        wanted = request.requested_output_names()
        return pb_utils.InferenceResponse([pb_utils.Tensor(n, found[n]) for n in wanted])
