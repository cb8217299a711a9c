"""The layers of an exported graph that int8 is for, and the activations that they read.

A layer goes by the name of its module, as `backbone.layer1.0.conv1`, and an activation by its layer's:
fp32 and fp16 graphs of a network name their tensors differently, but these alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from comask.runtime.parity.graph_layers import layer_of

CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}  # of output channels in the weights


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or fully connected layer.

    Attributes:
        name: of its module.
        weight: name of the initializer.
        channel_axis: the weight's axis of output channels.
        nodes: places in the graph's node list; several where a layer is used for several tensors.
    """

    name: str
    weight: str
    channel_axis: int
    nodes: tuple[int, ...]


def graph_layers(model: onnx.ModelProto) -> list[Layer]:
    """The layers of a graph in the order of their first use.

    Those that turn one vector an image into another (channel attention) are left out: int8 saves
    nothing there.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, Layer] = {}
    for place, node in enumerate(model.graph.node):
        name = layer_of(node)
        # one whose weights are no initializer is int8 already
        if name is None or ".attention." in name or node.input[1] not in weights:
            continue
        nodes = found[name].nodes if name in found else ()
        axis = CHANNEL_AXIS[node.op_type]
        found[name] = Layer(name, node.input[1], axis, (*nodes, place))
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Reading:
    """A place where an int8 layer reads an activation.

    Attributes:
        name: that the activation has in all graphs of a network: `LAYER` is what a layer reads,
            `LAYER:1` at its second use and so on; `LAYER+` is what is added to a layer's output in a
            residual block.
        layer: that reads it, or whose output it is added to.
        tensor: its name in this graph.
        node: place of the reading node in the graph's list.
        input: of that node.
    """

    name: str
    layer: str
    tensor: str
    node: int
    input: int


def readings(model: onnx.ModelProto) -> list[Reading]:
    """All of a graph, in the order of its nodes."""
    found = []
    producers: dict[str, Layer] = {}
    for layer in graph_layers(model):
        for use, place in enumerate(layer.nodes):
            node = model.graph.node[place]
            name = f"{layer.name}:{use}" if use else layer.name
            found.append(Reading(name, layer.name, node.input[0], place, 0))
            producers[node.output[0]] = layer
    read = {reading.tensor for reading in found}
    for place, node in enumerate(model.graph.node):
        if node.op_type != "Add":
            continue
        for i, added in enumerate(node.input):
            before = producers.get(node.input[1 - i])
            # the shortcut is what a layer reads as well, or a convolution of that
            shortcut = added in read or ".downsample." in getattr(producers.get(added), "name", "")
            if before is not None and len(before.nodes) == 1 and shortcut:
                found.append(Reading(f"{before.name}+", before.name, added, place, i))
                break
    return sorted(found, key=lambda reading: reading.node)


def activations(model: onnx.ModelProto) -> dict[str, str]:
    """The tensors that a graph's readings are of, by the names that all graphs share."""
    return {reading.name: reading.tensor for reading in readings(model)}
