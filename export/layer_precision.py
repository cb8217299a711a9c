"""Compares the precision of each layer in the ONNX graph with the precision in the built engine.

Networks are strongly typed, so a layer of the parsed network that differs means that a tool has changed
the model, which is an error. What TensorRT's inspector says of the engine is weaker: a fused layer names
many nodes, but only the types of its edges. So a difference there is reported, and the comparison of the
outputs with PyTorch decides. Only convolutions and matrix products are compared; the casts and reformats
that TensorRT adds have no counterpart in the graph.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx

from comask.errors import EngineError
from comask.runtime.trt.engine_folder import LayerCounts

WEIGHTY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
WEIGHTY_LAYERS = {"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"}
# `[ONNX Layer: NAME]` in a layer's metadata; a fused layer of an engine names several.
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
WORD = re.compile(r"\w+")
SHORT = {"FLOAT": "fp32", "HALF": "fp16", "INT8": "int8", "BF16": "bf16"}
# The names of tensor types in the engine inspectors of TensorRT 10 and 11.
SPELLINGS = {
    "FP32": "fp32", "Float": "fp32", "FP16": "fp16", "Half": "fp16", "Int8": "int8", "BF16": "bf16",
}  # fmt: skip


def asked_precisions(model: onnx.ModelProto) -> dict[str, str]:
    """Returns the precision of each convolution and matrix product, by node name.

    It is the type of the node's weights, or int8 if they come from a DequantizeLinear.
    """
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {
        info.name: info.type.tensor_type.elem_type
        for info in (*model.graph.value_info, *model.graph.input)
    }
    producer = {output: node for node in model.graph.node for output in node.output}
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    precisions = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTY:
            continue
        weights = node.input[1]
        before = producer.get(weights)
        if before is not None and before.op_type == "DequantizeLinear":
            precisions[node.name] = "int8"
        elif types.get(weights) in names:
            precisions[node.name] = names[types[weights]]
    return precisions


def network_layers(network: Any) -> dict[str, str]:
    """Returns the precision of each heavy layer of a parsed network, by the name of its ONNX node."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    dequantized = {layer.get_output(0).name for layer in layers if layer.type.name == "DEQUANTIZE"}
    precisions = {}
    for layer in layers:
        if layer.type.name not in WEIGHTY_LAYERS:
            continue
        source = layer.get_input(0)
        is_int8 = source.name in dequantized
        kind = "int8" if is_int8 else SHORT.get(source.dtype.name, source.dtype.name)
        for name in ONNX_LAYER.findall(layer.metadata) or [layer.name]:
            precisions[name] = kind
    return precisions


def engine_layers(information: str) -> dict[str, str]:
    """Returns the precision of each layer of a built engine, by the name of its ONNX node.

    Layers of several nodes are left out: their edges say nothing about what is inside.

    Args:
        information: the result of `EngineInspector.get_engine_information(LayerInformationFormat.JSON)`
            for an engine that was built with detailed profiling verbosity.
    """
    precisions: dict[str, str] = {}
    for layer in json.loads(information)["Layers"]:
        if not isinstance(layer, dict):
            continue  # Only a name: the engine was built without detailed verbosity.
        spelled = [
            str(tensor.get("Format/Datatype", ""))
            for side in ("Inputs", "Outputs")
            for tensor in layer.get(side) or ()
        ]
        words = {word for text in spelled for word in WORD.findall(text)}
        kinds = {SPELLINGS[word] for word in words & SPELLINGS.keys()}
        nodes = ONNX_LAYER.findall(str(layer.get("Metadata", "")))
        if len(kinds) == len(nodes) == 1:
            precisions[nodes[0]] = kinds.pop()
    return precisions


def check_precisions(
    asked: Mapping[str, str], network: Mapping[str, str], engine: Mapping[str, str] | None
) -> LayerCounts:
    """Compares the built precisions with the graph's precisions.

    It compares every layer of the parsed network, and the engine's layers that contain a single node.

    Args:
        asked: the result of `asked_precisions`.
        network: the result of `network_layers`.
        engine: the result of `engine_layers`; None if the engine could not be opened.

    Returns:
        The number of the graph's layers, the numbers of recognised layers by precision, and the engine's
        layers that seem to differ.

    Raises:
        EngineError: a layer of the network differs, or fewer than half of them were recognised.
    """
    if wrong := _differing(asked, network):
        name = next(iter(wrong))
        raise EngineError(
            f"{len(wrong)} layers of the network have another precision than the graph: {name} is "
            f"{wrong[name]}, expected {asked[name]}"
        )
    matched = sum(name in network for name in asked)
    if 2 * matched < len(asked):
        raise EngineError(
            f"the precision of only {matched} of {len(asked)} layers could be read back, expected at "
            f"least half: this TensorRT names its layers in a way that comask does not know"
        )
    return LayerCounts(
        of=len(asked),
        network=_count(asked, network),
        engine=None if engine is None else _count(asked, engine),
        differing=_differing(asked, engine or {}),
    )


def _differing(asked: Mapping[str, str], built: Mapping[str, str]) -> dict[str, str]:
    return {name: built[name] for name, kind in asked.items() if built.get(name, kind) != kind}


def _count(asked: Mapping[str, str], built: Mapping[str, str]) -> dict[str, int]:
    return dict(sorted(Counter(kind for name, kind in built.items() if name in asked).items()))
