"""Q/DQ placement: a float graph → the same graph with chosen layers in int8.

Symmetric throughout, as TensorRT wants it: activations by one scale a tensor, weights by one a channel
and stored as int8. A layer becomes int8 where both of its inputs come out of a DequantizeLinear. Nothing
is put behind a layer: what follows it (bias, normalisation, ReLU) stays in float until the next layer's
input, and TensorRT fuses it. Of what a residual block adds, the shortcut is quantised too, so that the
last convolution adds it inside its int8 kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from comask.calib.layers import Layer, Reading, graph_layers, readings

LARGEST = 127  # of int8, without the -128 that has no counterpart


def quantize_graph(
    model: onnx.ModelProto,
    largest: Mapping[str, float],
    layers: Collection[str],
) -> onnx.ModelProto:
    """A copy of an fp32 or fp16 graph in which `layers` compute in int8.

    Args:
        model: as exported.
        largest: of each activation, by the names of `activations`, the |value| that int8 ends at.
        layers: names among those of `graph_layers`; the others stay as they are.
    """
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    placement = _Placement(quantized.graph, graph_layers(model))
    for reading in readings(model):
        if reading.layer in layers:
            placement.add(reading, largest[reading.name])
    placement.rewrite()
    return quantized


class _Placement:
    """Changes to one graph.

    Args:
        graph: changed in place.
        layers: all of its layers.
    """

    def __init__(self, graph: onnx.GraphProto, layers: Sequence[Layer]) -> None:
        self._graph = graph
        self._layers = {layer.name: layer for layer in layers}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._added: list[TensorProto] = []
        self._before: dict[
            int, list[NodeProto]
        ] = {}  # nodes to insert, by the node they stand before
        self._dequantized: dict[str, str] = {}  # by the name of what was quantised

    def add(self, reading: Reading, largest: float) -> None:
        """Makes one reading one of int8; readings come in the order of their nodes."""
        layer, node = self._layers[reading.layer], self._graph.node[reading.node]
        new = self._before.setdefault(reading.node, [])
        weights = numpy_helper.to_array(self._initializers[layer.weight])
        dequantized = self._activation(reading.tensor, largest, weights.dtype, new)
        node.input[reading.input] = dequantized
        if reading.node in layer.nodes:
            node.input[1] = self._weights(layer, weights, new)

    def _activation(
        self, tensor: str, largest: float, dtype: np.dtype, new: list[NodeProto]
    ) -> str:
        """The name of a tensor's values as int8 has them; its nodes go where it is first needed."""
        if tensor not in self._dequantized:
            scale, zero = self._scale(tensor, np.array(largest), dtype)
            quantized, dequantized = f"{tensor}.int8", f"{tensor}.dequantized"
            new += [
                helper.make_node("QuantizeLinear", [tensor, scale, zero], [quantized],
                                 name=f"{tensor}.quantize"),
                helper.make_node("DequantizeLinear", [quantized, scale, zero], [dequantized],
                                 name=f"{tensor}.dequantize"),
            ]  # fmt: skip
            self._dequantized[tensor] = dequantized
        return self._dequantized[tensor]

    def _weights(self, layer: Layer, weights: NDArray[np.floating], new: list[NodeProto]) -> str:
        if layer.weight not in self._dequantized:
            axis = layer.channel_axis
            others = tuple(i for i in range(weights.ndim) if i != axis)
            largest = np.abs(weights.astype(np.float64)).max(axis=others)
            scale, zero = self._scale(layer.weight, largest, weights.dtype)
            values = numpy_helper.to_array(self._added[-2]).astype(np.float64)
            rows = values.reshape([-1 if i == axis else 1 for i in range(weights.ndim)])
            codes = np.clip(np.rint(weights / rows), -LARGEST, LARGEST).astype(np.int8)
            self._added.append(numpy_helper.from_array(codes, f"{layer.weight}.int8"))
            dequantized = f"{layer.weight}.dequantized"
            new.append(
                helper.make_node(
                    "DequantizeLinear", [f"{layer.weight}.int8", scale, zero], [dequantized],
                    name=f"{layer.weight}.dequantize", axis=axis,
                )
            )  # fmt: skip
            self._dequantized[layer.weight] = dequantized
        return self._dequantized[layer.weight]

    def _scale(self, name: str, largest: NDArray[np.floating], dtype: np.dtype) -> tuple[str, str]:
        """Initializers of a scale in the type of what is quantised, and of zero points."""
        exact = np.where(largest > 0, largest / LARGEST, 1.0)  # where all is zero any scale serves
        scale = exact.astype(dtype)
        # rounded up, or the largest value would be clipped; tiny ones round far
        scale = np.where(scale < exact, np.nextafter(scale, dtype.type(np.inf)), scale)
        names = f"{name}.scale", f"{name}.zero_point"
        self._added += [
            numpy_helper.from_array(scale, names[0]),
            numpy_helper.from_array(np.zeros(scale.shape, np.int8), names[1]),
        ]
        return names

    def rewrite(self) -> None:
        """Puts everything in its place."""
        nodes = [
            node
            for place, old in enumerate(self._graph.node)
            for node in (*self._before.get(place, ()), old)
        ]
        read = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        # copies: deleting a repeated field's content takes its messages along
        nodes, kept = ([_copy(message) for message in messages] for messages in (nodes, kept))
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend(nodes)
        self._graph.initializer.extend([*kept, *self._added])


def _copy(message: NodeProto | TensorProto) -> NodeProto | TensorProto:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
