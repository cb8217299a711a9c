"""What each layer of an ONNX graph reads and gives on one image.

A layer goes by the name of its module, as `backbone.layer1.0.conv1`, which its weight has in the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from comask.runtime.ort_session import OrtSession
from comask.runtime.session import Array

if TYPE_CHECKING:
    import onnx

LAYERS = ("Conv", "ConvTranspose", "Gemm")

Key = tuple[str, int]  # a module's name, and which of its uses


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Tensors of one use of a layer, f32.

    Attributes:
        given: what it was given.
        read: what it computes with; of an int8 layer that is `given` after rounding, else the same.
        output: what it gives.
        weight: what it computes with, where int8 rounds it; else None.
    """

    given: Array
    read: Array
    output: Array
    weight: Array | None


@dataclass(frozen=True, slots=True)
class GraphTensors:
    """What a graph computed.

    Attributes:
        layers: in the graph's order.
        shortcuts: by residual block what is added to its last convolution, where int8 rounds it.
        rois: [B, N, 4] of each RoIAlign, in the graph's order.
    """

    layers: dict[Key, LayerTensors]
    shortcuts: dict[str, Array]
    rois: list[Array]


def run_graph(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> GraphTensors:
    """Runs a graph on the CPU as the file has it, without ONNX Runtime's optimiser.

    Args:
        model: takes more outputs.
        feeds: inputs of the graph, and maybe more.

    Raises:
        BackendUnavailableError: when onnxruntime is not installed.
        BundleError: when it cannot load the graph.
    """
    places, shortcuts = _layer_tensors(model), _shortcuts(model)
    pooled = [node.input[4] for node in model.graph.node if node.op_type == "PyramidRoiAlign"]
    there = {entry.name for entry in (*model.graph.input, *model.graph.output)}
    wanted = [name for names in places.values() for name in names if name]
    for name in dict.fromkeys([*wanted, *shortcuts.values(), *pooled]):
        if name not in there:
            model.graph.output.add().name = name
    session = OrtSession(model.SerializeToString(), "cpu", optimized=False)
    found = {**feeds, **session.run(feeds)}
    session.close()

    def value(name: str) -> Array:
        return np.asarray(found[name], np.float32)

    return GraphTensors(
        {
            key: LayerTensors(
                value(given), value(read), value(output), value(weight) if weight else None
            )
            for key, (given, read, output, weight) in places.items()
        },
        {block: value(name) for block, name in shortcuts.items()},
        [value(name) for name in pooled],
    )


def layer_of(node: onnx.NodeProto) -> str | None:
    """The module that a node computes, in float or int8; None where it is no layer."""
    if node.op_type not in LAYERS or not node.input[1].startswith("model."):
        return None
    weight: str = node.input[1].removesuffix(".dequantized")
    return weight.removeprefix("model.").removesuffix(".weight")


def _layers(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    for node in model.graph.node:
        if (name := layer_of(node)) is not None:
            yield name, node


def _layer_tensors(model: onnx.ModelProto) -> dict[Key, tuple[str, str, str, str | None]]:
    """Names of the tensors that each layer was given, reads and gives, and of its rounded weight."""
    producers = {name: node for node in model.graph.node for name in node.output}
    uses: Counter[str] = Counter()
    found: dict[Key, tuple[str, str, str, str | None]] = {}
    for name, node in _layers(model):
        given = node.input[0]
        for op_type in ("DequantizeLinear", "QuantizeLinear"):
            if given in producers and producers[given].op_type == op_type:
                given = producers[given].input[0]
        weight = node.input[1] if node.input[1] in producers else None
        found[name, uses[name]] = (given, node.input[0], node.output[0], weight)
        uses[name] += 1
    return found


def _shortcuts(model: onnx.ModelProto) -> dict[str, str]:
    """Names of int8 shortcuts, by residual block."""
    outputs = {node.output[0]: name for name, node in _layers(model)}
    rounded = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return {
        outputs[convolved].rpartition(".")[0]: added
        for node in model.graph.node
        if node.op_type == "Add"
        for convolved, added in (node.input, reversed(node.input))
        if convolved in outputs and added in rounded
    }
