"""Places Q/DQ nodes: turns a float graph into the same graph with chosen layers in int8.

As TensorRT requires, quantisation is symmetric: activations have one scale per tensor, weights have one
scale per channel and are stored as int8. A layer becomes int8 if both of its inputs come from a
DequantizeLinear. No nodes are placed behind a layer: its bias, normalisation and ReLU stay in float until
the next layer's input, and TensorRT fuses them. In a residual block the shortcut is quantised, too, so
that the last convolution adds it inside its int8 kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from comask.bundle import INT8_BASE, STAGES, Bundle
from comask.calib.cache import CACHE, Calibration
from comask.runtime.parity.layers import layer_of

CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}  # the weights' axis of output channels

LARGEST = 127  # the largest int8; -128 is not used, so that the range is symmetric

LIMIT = 1e-2  # relative tolerance of a scale, which may be an f16 with rounding errors of 2^-11


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or fully connected layer.

    Attributes:
        name: the name of the layer's module.
        weight: the name of the weights' initializer.
        channel_axis: the weights' axis of output channels.
        nodes: indices in the graph's node list; several if the layer is applied to several tensors.
    """

    name: str
    weight: str
    channel_axis: int
    nodes: tuple[int, ...]


def graph_layers(model: onnx.ModelProto) -> list[Layer]:
    """Returns the layers of a graph in the order of their first use.

    Channel attention is left out: it processes one vector per image, where int8 saves nothing.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    layers: dict[str, Layer] = {}
    for place, node in enumerate(model.graph.node):
        name = layer_of(node)
        # A layer whose weights are not an initializer is already int8.
        if name is None or ".attention." in name or node.input[1] not in weights:
            continue
        nodes = layers[name].nodes if name in layers else ()
        axis = CHANNEL_AXIS[node.op_type]
        layers[name] = Layer(name, node.input[1], axis, (*nodes, place))
    return list(layers.values())


@dataclass(frozen=True, slots=True)
class Reading:
    """A place where an int8 layer reads an activation.

    Attributes:
        name: the activation's name in all graphs of a network: `LAYER` for a layer's input, `LAYER:1`
            for the input at its second use and so on; `LAYER+` for the shortcut that a residual block
            adds to the layer's output.
        layer: the layer that reads the activation, or to whose output it is added.
        tensor: the activation's name in this graph.
        node: the index of the reading node in the graph's node list.
        input: the index of the activation among that node's inputs.
    """

    name: str
    layer: str
    tensor: str
    node: int
    input: int


def readings(model: onnx.ModelProto) -> list[Reading]:
    """Returns all readings of a graph, in the order of its nodes."""
    result = []
    producers: dict[str, Layer] = {}
    for layer in graph_layers(model):
        for use, place in enumerate(layer.nodes):
            node = model.graph.node[place]
            name = f"{layer.name}:{use}" if use else layer.name
            result.append(Reading(name, layer.name, node.input[0], place, 0))
            producers[node.output[0]] = layer
    read = {reading.tensor for reading in result}
    for place, node in enumerate(model.graph.node):
        if node.op_type != "Add":
            continue
        for i, added in enumerate(node.input):
            before = producers.get(node.input[1 - i])
            # The shortcut is a tensor that a layer reads as well, or a convolution of such a tensor.
            shortcut = added in read or ".downsample." in getattr(producers.get(added), "name", "")
            if before is not None and len(before.nodes) == 1 and shortcut:
                result.append(Reading(f"{before.name}+", before.name, added, place, i))
                break
    return sorted(result, key=lambda reading: reading.node)


def activations(model: onnx.ModelProto) -> dict[str, str]:
    """Returns the tensors that a graph's layers read, by the names that all graphs share."""
    return {reading.name: reading.tensor for reading in readings(model)}


def quantize_graph(
    model: onnx.ModelProto,
    largest: Mapping[str, float],
    layers: Collection[str],
) -> onnx.ModelProto:
    """Returns a copy of an fp32 or fp16 graph in which `layers` compute in int8.

    Args:
        model: the exported graph.
        largest: the magnitude that becomes 127, of each activation by its name in `activations`.
        layers: the names of layers of `graph_layers` that become int8; the others stay unchanged.
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
    """Collects changes to one graph and applies them.

    Args:
        graph: the graph, which is changed in place.
        layers: all of its layers.
    """

    def __init__(self, graph: onnx.GraphProto, layers: Sequence[Layer]) -> None:
        self._graph = graph
        self._layers = {layer.name: layer for layer in layers}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._added: list[TensorProto] = []
        self._before: dict[int, list[NodeProto]] = {}  # index of a node → new nodes before it
        self._dequantized: dict[str, str] = {}  # name of a quantised tensor → its dequantised name

    def add(self, reading: Reading, largest: float) -> None:
        """Makes one reading int8. Call it for readings in the order of their nodes."""
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
        """Returns the name of a tensor's dequantised values; adds their nodes at the first use."""
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
        """Adds initializers of a scale, in the tensor's type, and of zero points; returns their names."""
        exact = np.where(largest > 0, largest / LARGEST, 1.0)  # For zeros, any scale works.
        scale = exact.astype(dtype)
        # Round up, so that the largest value is not clipped; f16 rounds tiny scales by a lot.
        scale = np.where(scale < exact, np.nextafter(scale, dtype.type(np.inf)), scale)
        names = f"{name}.scale", f"{name}.zero_point"
        self._added += [
            numpy_helper.from_array(scale, names[0]),
            numpy_helper.from_array(np.zeros(scale.shape, np.int8), names[1]),
        ]
        return names

    def rewrite(self) -> None:
        """Inserts the new nodes and initializers into the graph."""
        nodes = [
            node
            for place, old in enumerate(self._graph.node)
            for node in (*self._before.get(place, ()), old)
        ]
        read = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        # Copies are needed because deleting a repeated field's content also destroys its messages.
        nodes, kept = ([_copy(message) for message in messages] for messages in (nodes, kept))
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend(nodes)
        self._graph.initializer.extend([*kept, *self._added])


def _copy(message: NodeProto | TensorProto) -> NodeProto | TensorProto:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def altered_scales(bundle: Bundle) -> list[str]:
    """Returns a sentence for each activation whose scale in the int8 graphs is not the calibration's.

    Args:
        bundle: a bundle with int8 graphs and the cache of their calibration.

    Raises:
        BundleError: a graph is missing or altered.
        CalibrationError: the bundle has no cache, or the cache of other graphs.
    """
    path = bundle.folder / CACHE
    calibration = Calibration.load(path)
    calibration.require(bundle, path)
    largest = calibration.ranges(bundle.manifest.verification["int8"]["calibration"]["method"])
    altered = []
    for stage in STAGES:
        names = {
            reading.tensor: reading.name for reading in readings(_graph(bundle, stage, INT8_BASE))
        }
        scales = {t.name: t for t in _graph(bundle, stage, "int8").graph.initializer}
        for tensor, name in names.items():
            # Float layers have no scale; for an activation of zeros, any scale works.
            if f"{tensor}.scale" not in scales or not largest.get(name):
                continue
            scale = numpy_helper.to_array(scales[f"{tensor}.scale"])
            smallest = float(np.finfo(scale.dtype).smallest_subnormal)
            expected = largest[name] / LARGEST
            if not abs(float(scale) - expected) <= max(LIMIT * expected, smallest):
                altered.append(
                    f"{stage}: the input of {name} has the scale {float(scale):.4g}, but its "
                    f"calibration gives {expected:.4g}"
                )
    return altered


def _graph(bundle: Bundle, stage: str, precision: str) -> onnx.ModelProto:
    return onnx.load(bundle.graph(stage, precision))
