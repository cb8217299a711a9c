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

from comask.errors import EngineError
from comask.runtime.trt.engine_folder import LayerCounts

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
        if not isinstance(layer, dict):
            continue  # a name alone: built without detailed verbosity
        spelled = [
            str(tensor.get("Format/Datatype", ""))
            for side in ("Inputs", "Outputs")
            for tensor in layer.get(side) or ()
        ]
        kinds = {kind for text in spelled for name, kind in SPELLINGS.items() if name in text}
        # a fused layer may hold float islands beside half products: no verdict on any of them
        if len(kinds) == 1:
            for name in ONNX_LAYER.findall(str(layer.get("Metadata", ""))):
                found[name] = next(iter(kinds))
    return found


def check_precisions(
    asked: Mapping[str, str], network: Mapping[str, str], engine: Mapping[str, str] | None
) -> LayerCounts:
    """Compares what was built with what the graph asks for.

    Every layer of the parsed network is judged; of the engine those that fusion left recognisable.

    Args:
        asked: see `asked_precisions`.
        network: see `network_layers`.
        engine: see `engine_layers`; None where the engine could not be opened.

    Returns:
        how many layers the graph has, and how many of each precision were found again.

    Raises:
        EngineError: when one differs, or fewer than half were found again in the network.
    """
    for where, found in (("network", network), ("engine", engine or {})):
        wrong = [name for name, kind in asked.items() if found.get(name, kind) != kind]
        if wrong:
            name = wrong[0]
            raise EngineError(
                f"{len(wrong)} layers of the {where} have another precision than the graph: {name} is "
                f"{found[name]}, {asked[name]} was asked for"
            )
    matched = sum(name in network for name in asked)
    if 2 * matched < len(asked):
        raise EngineError(
            f"the precision of {matched} layers out of {len(asked)} could be read back, at least half "
            f"expected: this TensorRT names its layers in a way that comask does not know"
        )
    return LayerCounts(
        of=len(asked),
        network=_count(asked, network),
        engine=None if engine is None else _count(asked, engine),
    )


def _count(asked: Mapping[str, str], found: Mapping[str, str]) -> dict[str, int]:
    return dict(sorted(Counter(kind for name, kind in found.items() if name in asked).items()))
