"""Triton's `config.pbtxt` of the three models of a repository.

The fields are those of ModelConfig in https://github.com/triton-inference-server/common,
protobuf/model_config.proto.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comask.bundle import WEIGHTS, Manifest
from comask.runtime.backends.base import TensorSpec
from comask.runtime.triton_tensors import CLIENT_INPUTS, client_outputs, graph_tensors, stage_name

# While one instance prepares images or finds the masks' edges, the other one's are in the network.
CLIENT_INSTANCES = 2
QUEUE_DELAY = 1000  # microseconds that a request waits at most for others to share a batch with
NO_OPTIMIZATION = 2  # in Triton's counting of ONNX Runtime's levels


class Name(str):
    """A value that protobuf writes without quotes: of an enumeration."""

    __slots__ = ()


DATA_TYPES = {
    np.dtype(object): Name("TYPE_STRING"),
    np.dtype(np.uint8): Name("TYPE_UINT8"),
    np.dtype(np.int32): Name("TYPE_INT32"),
    np.dtype(np.int64): Name("TYPE_INT64"),
    np.dtype(np.float16): Name("TYPE_FP16"),
    np.dtype(np.float32): Name("TYPE_FP32"),
}


def client_config(
    name: str, manifest: Manifest, backend: str, max_batch: int, preferred: Sequence[int]
) -> dict[str, Any]:
    """Of the model that clients see, which runs in Python.

    Args:
        name: of the model.
        manifest: of the bundle.
        backend: of the stages, with the precision, as the command line writes it.
        max_batch: most images of a request, and of requests that share a batch.
        preferred: batches that are run without waiting for a larger one.
    """
    inputs = [
        # images of one batch may have any sizes: comask brings them onto canvases
        _tensor(spec) | {"optional": True, "allow_ragged_batch": True}
        for spec in CLIENT_INPUTS
    ]
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": max_batch,
        "input": inputs,
        "output": [_tensor(spec) for spec in client_outputs(manifest)],
        "dynamic_batching": {
            "preferred_batch_size": list(preferred),
            "max_queue_delay_microseconds": QUEUE_DELAY,
        },
        "instance_group": [{"count": CLIENT_INSTANCES, "kind": Name("KIND_CPU")}],
        "parameters": _parameters(
            backend=backend,
            weights_sha256=manifest.files[WEIGHTS],
            comask_version=manifest.comask_version,
        ),
    }


def stage_config(
    name: str, stage: str, manifest: Manifest, backend: str, max_batch: int, **parameters: str
) -> dict[str, Any]:
    """Of the model that is a stage's graph or plan.

    Args:
        name: of the model that clients see.
        stage: `stage1` or `stage2`.
        manifest: of the bundle.
        backend: `onnxruntime` or `tensorrt`, with the precision behind a colon.
        max_batch: most images that may run together.
        parameters: what else the file is known by.
    """
    library, _, precision = backend.partition(":")
    inputs, outputs = graph_tensors(manifest, stage, precision)
    config = {
        "name": stage_name(name, stage),
        "platform": {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}[library],
        "max_batch_size": max_batch,
        "input": [_tensor(spec) for spec in inputs],
        "output": [_tensor(spec) for spec in outputs],
        "dynamic_batching": {},  # takes together what waits
        "instance_group": [
            {"count": 1, "kind": Name("KIND_GPU" if library == "tensorrt" else "KIND_AUTO")}
        ],
        "parameters": _parameters(**parameters),
    }
    return config | ({"optimization": _onnxruntime(precision)} if library == "onnxruntime" else {})


def _onnxruntime(precision: str) -> dict[str, Any]:
    """The same settings as in comask's own sessions."""
    exact = {"name": "cuda", "parameters": [{"key": "use_tf32", "value": "0"}]}
    settings: dict[str, Any] = {"execution_accelerators": {"gpu_execution_accelerator": [exact]}}
    return settings | ({"graph": {"level": NO_OPTIMIZATION}} if precision == "int8" else {})


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """An input or output; `spec.shape` is without the batch."""
    dims = [-1 if isinstance(size, str) else size for size in spec.shape]
    tensor: dict[str, Any] = {"name": spec.name, "data_type": DATA_TYPES[spec.dtype], "dims": dims}
    # Triton has no tensors of the batch alone, so clients see [B, 1] for a graph's [B]
    return tensor if dims else tensor | {"dims": [1], "reshape": {"shape": []}}


def _parameters(**values: str) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def to_pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format; lists are repeated fields."""
    lines = []
    for key, value in message.items():
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not any(isinstance(entry, dict) for entry in value):
            lines.append(f"{indent}{key}: [{', '.join(map(_scalar, value))}]\n")
            continue
        for entry in entries:
            if isinstance(entry, dict):
                lines.append(f"{indent}{key} {{\n{to_pbtxt(entry, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(entry)}\n")
    return "".join(lines)


def _scalar(value: str | int) -> str:
    # a bool is true or false in both formats, and both escape strings alike
    return value if isinstance(value, Name) else json.dumps(value, ensure_ascii=False)
