"""Writes Triton's `config.pbtxt` for the three models of a repository.

protobuf/model_config.proto in https://github.com/triton-inference-server/common defines the fields of
ModelConfig.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comask.bundle import WEIGHTS, Manifest
from comask.kernels.launch import LEVEL_STRIDES
from comask.runtime.backends.base import TensorSpec
from comask.runtime.triton_tensors import CLIENT_INPUTS, client_outputs, graph_tensors, stage_name
from comask.runtime.trt.memory_format import LINEAR

# While one instance prepares images or encodes masks, the other one's images are in the network.
CLIENT_INSTANCES = 2
QUEUE_DELAY = 1000  # microseconds that a request waits at most for others to share a batch with
NO_OPTIMIZATION = 2  # Triton's number of the ONNX Runtime level that disables all optimisations


class Name(str):
    """A value of an enumeration, which protobuf writes without quotes."""

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
    """Returns the configuration of the model that clients call, which runs in Python.

    Args:
        name: the model's name.
        manifest: the bundle's manifest.
        backend: the backend of the stages with its precision, as on the command line.
        max_batch: the most images of a request, and of requests that share a batch.
        preferred: batch sizes that run without waiting for more images.
    """
    inputs = [
        # Images of one batch may have any sizes, since comask pads them to canvases.
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
    name: str,
    stage: str,
    manifest: Manifest,
    backend: str,
    max_batch: int,
    *,
    map_format: str,
    **parameters: str,
) -> dict[str, Any]:
    """Returns the configuration of the model that runs a stage's graph or plan.

    Args:
        name: the name of the model that clients call.
        stage: `stage1` or `stage2`.
        manifest: the bundle's manifest.
        backend: `onnxruntime` or `tensorrt`, followed by a colon and the precision.
        max_batch: the most images that may run together.
        map_format: TensorRT's name of the memory format of the feature maps in a plan, see `EngineInfo`.
        parameters: further facts about the file.
    """
    library, _, precision = backend.partition(":")
    inputs, outputs = graph_tensors(manifest, stage, precision)
    config = {
        "name": stage_name(name, stage),
        "platform": {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}[library],
        "max_batch_size": max_batch,
        "input": [_stage_tensor(spec, map_format) for spec in inputs],
        "output": [_stage_tensor(spec, map_format) for spec in outputs],
        "dynamic_batching": {},  # Waiting requests are batched without a delay.
        "instance_group": [
            {"count": 1, "kind": Name("KIND_GPU" if library == "tensorrt" else "KIND_AUTO")}
        ],
        "parameters": _parameters(**parameters),
    }
    return config | ({"optimization": _onnxruntime(precision)} if library == "onnxruntime" else {})


def _onnxruntime(precision: str) -> dict[str, Any]:
    """Returns the settings of comask's own ONNX Runtime sessions."""
    exact = {"name": "cuda", "parameters": [{"key": "use_tf32", "value": "0"}]}
    settings: dict[str, Any] = {"execution_accelerators": {"gpu_execution_accelerator": [exact]}}
    return settings | ({"graph": {"level": NO_OPTIMIZATION}} if precision == "int8" else {})


def _stage_tensor(spec: TensorSpec, map_format: str) -> dict[str, Any]:
    """Returns a stage's input or output; feature maps may lie in memory in an order of TensorRT's."""
    tensor = _tensor(spec)
    if spec.name in LEVEL_STRIDES and map_format != LINEAR:
        tensor["is_non_linear_format_io"] = True
    return tensor


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """Returns an input or output; `spec.shape` does not include the batch."""
    dims = [-1 if isinstance(size, str) else size for size in spec.shape]
    tensor: dict[str, Any] = {"name": spec.name, "data_type": DATA_TYPES[spec.dtype], "dims": dims}
    # Triton has no tensors of shape [B], so clients see [B, 1] for them.
    return tensor if dims else tensor | {"dims": [1], "reshape": {"shape": []}}


def _parameters(**values: str) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def to_pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """Returns a message in protobuf's text format; lists become repeated fields."""
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
    # JSON and protobuf's text format write bools and escape strings in the same way.
    return value if isinstance(value, Name) else json.dumps(value, ensure_ascii=False)
