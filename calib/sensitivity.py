"""How much each layer's quantisation alone disturbs what the network predicts, and what a layer costs.

The disturbance is the share of noise, Σ(a - b)² / Σa², in one of the graph's predictions, the largest of
those that the layer leads to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from comask.calib.layers import graph_layers
from comask.calib.predictions import Feeds, predictions, run_predictions, with_outputs
from comask.calib.qdq import quantize_graph
from comask.runtime.ort_session import OrtSession
from comask.runtime.session import Array


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
    wanted = predictions(model)
    expected, counts = run_predictions(model, wanted, images)
    found = {}
    for layer in layers:
        places = [i for i, prediction in enumerate(wanted) if prediction.comparable_under(layer)]
        alone = quantize_graph(model, largest, {layer})
        noisy, _ = run_predictions(alone, [wanted[i] for i in places], images, counts)
        shares = [_noise(expected[i], rows) for i, rows in zip(places, noisy, strict=True)]
        found[layer] = max(shares, default=0.0)
        advance()
    return found


def _noise(expected: list[Array], found: list[Array]) -> float:
    power = noise = 0.0
    for a, b in zip(expected, found, strict=True):
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
    session = OrtSession(with_outputs(model, outputs).SerializeToString(), "cpu")
    for name, array in session.run(image).items():
        layer = outputs[name]
        weights = dims[layer.weight]
        positions = array.size / weights[layer.channel_axis]
        if layer.channel_axis == 1:  # a transposed convolution multiplies for each input
            positions /= math.prod(weights[2:])  # its kernel is as large as its stride
        found[layer.name] += math.prod(weights) * positions
    session.close()
    return found
