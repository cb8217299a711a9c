"""Q/DQ placement: a float graph → the same graph with chosen layers in int8.

Symmetric throughout, as TensorRT wants it: activations by one scale a tensor, weights by one a channel
and stored as int8. A layer becomes int8 where both of its inputs come out of a DequantizeLinear. Nothing
is put behind a layer: what follows it (bias, normalisation, ReLU) stays in float until the next layer's
input, and TensorRT fuses it. Of what a residual block adds, the shortcut is quantised too, so that the
last convolution adds it inside its int8 kernel.
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

CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}  # of output channels in the weights

LARGEST = 127  # of int8, without the -128 that has no counterpart

LIMIT = 1e-2  # relative: a scale is an f16, which rounds by 2^-11


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


def altered_scales(bundle: Bundle) -> list[str]:
    """One sentence an activation of the int8 graphs whose scale is not the calibration's.

    Args:
        bundle: with int8 graphs, and the cache of their calibration.

    Raises:
        BundleError: when a graph is missing or altered.
        CalibrationError: when the bundle has no cache, or one of other graphs.
    """
    path = bundle.folder / CACHE
    calibration = Calibration.load(path)
    calibration.require(bundle, path)
    largest = calibration.ranges(bundle.manifest.verification["int8"]["calibration"]["method"])
    found = []
    for stage in STAGES:
        names = {
            reading.tensor: reading.name for reading in readings(_graph(bundle, stage, INT8_BASE))
        }
        scales = {t.name: t for t in _graph(bundle, stage, "int8").graph.initializer}
        for tensor, name in names.items():
            # layers that stayed float have none; where all is zero any scale serves
            if f"{tensor}.scale" not in scales or not largest.get(name):
                continue
            scale = numpy_helper.to_array(scales[f"{tensor}.scale"])
            smallest = float(np.finfo(scale.dtype).smallest_subnormal)
            expected = largest[name] / LARGEST
            if not abs(float(scale) - expected) <= max(LIMIT * expected, smallest):
                found.append(
                    f"what {name} reads in {stage} has another scale than its calibration gives: "
                    f"{float(scale):.4g}, not {expected:.4g}"
                )
    return found


def _graph(bundle: Bundle, stage: str, precision: str) -> onnx.ModelProto:
    return onnx.load(bundle.graph(stage, precision))
