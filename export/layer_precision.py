"""Which precision each layer really has: asked by the ONNX graph, read back from what was built.

Networks are strongly typed, so a difference means that a tool changed the model on the way. The weighty
layers alone are compared: what TensorRT puts between them (casts, reformats) has no twin in the graph.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx

WEIGHTY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
WEIGHTY_LAYERS = {"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"}
# `[ONNX Layer: NAME]` in a layer's metadata; an engine's fused layer names several
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
SHORT = {"FLOAT": "fp32", "HALF": "fp16", "INT8": "int8", "BF16": "bf16"}
# how engine inspectors of TensorRT 10 and 11 name a tensor's type
SPELLINGS = {
    "FP32": "fp32", "Float": "fp32", "FP16": "fp16", "Half": "fp16", "Int8": "int8", "BF16": "bf16",
}  # fmt: skip


def asked_precisions(model: onnx.ModelProto) -> dict[str, str]:
    """The precision of each convolution and matrix product, by node name.

    It is the type of the node's weights, or int8 where they come out of a DequantizeLinear.
    """
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {
        info.name: info.type.tensor_type.elem_type
        for info in (*model.graph.value_info, *model.graph.input)
    }
    producer = {output: node for node in model.graph.node for output in node.output}
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    found = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTY:
            continue
        weights = node.input[1]
        before = producer.get(weights)
        if before is not None and before.op_type == "DequantizeLinear":
            found[node.name] = "int8"
        elif types.get(weights) in names:
            found[node.name] = names[types[weights]]
    return found


def network_layers(network: Any) -> dict[str, str]:
    """The precision of each weighty layer of a parsed network, by the name of its ONNX node."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    dequantized = {layer.get_output(0).name for layer in layers if layer.type.name == "DEQUANTIZE"}
    found = {}
    for layer in layers:
        if layer.type.name not in WEIGHTY_LAYERS:
            continue
        source = layer.get_input(0)
        is_int8 = source.name in dequantized
        kind = "int8" if is_int8 else SHORT.get(source.dtype.name, source.dtype.name)
        for name in ONNX_LAYER.findall(layer.metadata) or [layer.name]:
            found[name] = kind
    return found


def engine_layers(information: str) -> dict[str, str]:
    """The precision of each layer of a built engine, by the names of its ONNX nodes.

    Args:
        information: what `EngineInspector.get_engine_information(LayerInformationFormat.JSON)` gives
            for an engine built with detailed profiling verbosity.
    """
    found: dict[str, str] = {}
    for layer in json.loads(information)["Layers"]:
        if not isinstance(layer, dict) or not layer.get("Inputs"):
            continue  # names alone: built without detailed verbosity
        spelled = str(layer["Inputs"][0].get("Format/Datatype", ""))
        kinds = [kind for name, kind in SPELLINGS.items() if name in spelled]
        if kinds:
            for name in ONNX_LAYER.findall(str(layer.get("Metadata", ""))):
                found[name] = kinds[0]
    return found


def differences(asked: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Layers that were built in another precision than the graph's, one phrase each.

    A node without a layer of its own (folded away, or fused under another name) is not judged;
    `summary` counts those that are.
    """
    return [
        f"{name} is {found[name]}, {kind} was asked for"
        for name, kind in asked.items()
        if name in found and found[name] != kind
    ]


def summary(asked: Mapping[str, str], found: Mapping[str, str]) -> dict[str, Any]:
    """For `engine.json`: layers of each precision, and how many of the graph's were found again."""
    judged = [kind for name, kind in found.items() if name in asked]
    return {"found": dict(sorted(Counter(judged).items())), "of": len(asked)}
