"""How much each layer's quantisation alone disturbs what the network predicts, and what a layer costs.

The disturbance is the share of noise in a graph's predictions, Σ(a - b)² / Σa², the largest of them: of
the pyramid and the RPN's raw outputs in stage 1, of the class, mask and offset logits in stage 2. Raw,
since NMS turns any noise into other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from comask.calib.layers import graph_layers
from comask.calib.qdq import quantize_graph
from comask.runtime.ort_session import OrtSession
from comask.runtime.session import Array

PREDICTIONS = (
    "rpn.objectness", "rpn.deltas", "classifier.logits", "classifier.deltas", "head.mask",
    "head.offsets", "fine_head.mask",
)  # fmt: skip
PYRAMID = ("p2", "p3", "p4", "p5")

Feeds = Mapping[str, Array]


def disturbances(
    model: onnx.ModelProto,
    largest: Mapping[str, float],
    layers: Sequence[str],
    images: Sequence[Feeds],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Of layers of a graph.

    Args:
        model: the graph in fp32.
        largest: see `quantize_graph`.
        layers: names of those in question.
        images: inputs of the graph, an entry an image.
        advance: called after each layer.
    """
    names = probes(model)
    expected = _run(with_outputs(model, names), names, images)
    found = {}
    for layer in layers:
        alone = quantize_graph(model, largest, {layer})
        noisy = _run(with_outputs(alone, names), names, images)
        found[layer] = max(map(_noise, zip(expected, noisy, strict=True)))
        advance()
    return found


def probes(model: onnx.ModelProto) -> list[str]:
    """The tensors of a graph that its predictions are decoded from."""
    outputs = [output.name for output in model.graph.output if output.name in PYRAMID]
    for layer in graph_layers(model):
        if layer.name in PREDICTIONS:
            outputs += [model.graph.node[place].output[0] for place in layer.nodes]
    return outputs


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy that gives these tensors as outputs, and nothing else."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def _run(
    model: onnx.ModelProto, names: Sequence[str], images: Sequence[Feeds]
) -> list[list[Array]]:
    """By tensor, then by image."""
    session = OrtSession(model.SerializeToString(), "cpu", optimized=False)
    results = [session.run(feeds) for feeds in images]
    session.close()
    return [[result[name] for result in results] for name in names]


def _noise(pair: tuple[list[Array], list[Array]]) -> float:
    power = noise = 0.0
    for a, b in zip(*pair, strict=True):
        power += float(np.sum(np.square(a, dtype=np.float64)))
        noise += float(np.sum(np.square(a.astype(np.float64) - b)))
    return noise / power if power else math.inf if noise else 0.0


def costs(model: onnx.ModelProto, image: Feeds) -> dict[str, float]:
    """Multiplications of each layer for one image.

    Args:
        model: the graph in fp32.
        image: its inputs.
    """
    layers = graph_layers(model)
    outputs = {
        model.graph.node[place].output[0]: layer for layer in layers for place in layer.nodes
    }
    dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found = dict.fromkeys((layer.name for layer in layers), 0.0)
    session = OrtSession(with_outputs(model, list(outputs)).SerializeToString(), "cpu")
    for name, array in session.run(image).items():
        layer = outputs[name]
        weights = dims[layer.weight]
        positions = array.size / weights[layer.channel_axis]
        if layer.channel_axis == 1:  # a transposed convolution multiplies for each input
            positions /= math.prod(weights[2:])  # its kernel is as large as its stride
        found[layer.name] += math.prod(weights) * positions
    session.close()
    return found
