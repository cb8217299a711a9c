"""Searches for the layers that must stay float so that AP stays within a budget.

Layers are ordered by how much their quantisation alone disturbs the outputs. Since each trial costs an
evaluation, the search keeps one layer float, then two, four and so on until the budget is met, and then
reduces the number by bisection. Finally, it returns single layers to int8, the most expensive first, if
the budget allows it.

A disturbance is measured on the tensors from which predictions are decoded, before NMS, which could
turn any noise into different rows. These tensors are the pyramid and the RPN's raw outputs in stage 1,
and the class, mask and offset logits in stage 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from comask.calib.qdq import graph_layers, quantize_graph
from comask.errors import PrecisionError
from comask.runtime.backends.base import Array
from comask.runtime.backends.ort import OrtSession
from comask.runtime.compare import PYRAMID

LAST_LAYERS = (
    "rpn.objectness", "rpn.deltas", "classifier.logits", "classifier.deltas", "head.mask",
    "head.offsets", "fine_head.mask", "mask_scorer.iou",
)  # fmt: skip
CLASSIFIER = "classifier."
COUNT = "num_detections"

Feeds = Mapping[str, Array]
Loss = Callable[[frozenset[str]], float]


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation.

    Attributes:
        float_layers: the layers that stayed float.
        loss: AP points lost to the reference, by boxes or by masks, whichever is more.
    """

    float_layers: frozenset[str]
    loss: float


@dataclass(slots=True)
class Search:
    """Searches for the cheapest set of layers that must stay float.

    Args:
        loss: returns the expected loss of AP points if these layers stay float and all others are int8.
        budget: the largest permitted loss of AP points.

    Attributes:
        trials: all evaluations, in their order.
    """

    loss: Loss
    budget: float
    trials: list[Trial] = field(default_factory=list)

    def try_all_int8(self) -> bool:
        """Returns whether all layers can be int8."""
        return self._fits(frozenset())

    def run(
        self, disturbance: Mapping[str, float], cost: Mapping[str, float], sent_back: int = 6
    ) -> frozenset[str]:
        """Returns the layers that stay float.

        Args:
            disturbance: the disturbance by each layer, which orders them.
            cost: the cost of each layer in float, in any unit.
            sent_back: the number of layers that the search tries to return to int8.

        Raises:
            PrecisionError: even with every layer float, the budget is not met.
        """
        order = sorted(disturbance, key=lambda name: (-disturbance[name], name))
        if not self._fits(frozenset(order)):
            raise PrecisionError(
                f"--max-loss {self.budget:g} cannot be met: even with every layer in fp16, the "
                f"expected loss is {self.trials[-1].loss:.2f} AP points, including the standard error; "
                "give a larger --max-loss or --limit, or look for the cause with 'comask eval'"
            )
        low, high = 0, 1  # `high` layers are enough, `low` layers are not.
        while high < len(order) and not self._fits(frozenset(order[:high])):
            low, high = high, min(2 * high, len(order))
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(frozenset(order[:middle])):
                high = middle
            else:
                low = middle
        kept = frozenset(order[:high])
        # The last layer is needed: without it the budget was not met.
        rest = sorted(order[: high - 1], key=lambda name: (-cost[name], name))
        for name in rest[:sent_back]:
            if self._fits(kept - {name}):
                kept -= {name}
        return kept

    def _fits(self, float_layers: frozenset[str]) -> bool:
        loss = self.loss(float_layers)
        self.trials.append(Trial(float_layers, loss))
        return loss <= self.budget


def disturbances(
    model: onnx.ModelProto,
    largest: Mapping[str, float],
    layers: Sequence[str],
    images: Sequence[Feeds],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns how much each layer disturbs the predictions if it alone is int8: a share of their power.

    Args:
        model: the graph in fp32.
        largest: the largest magnitude of each activation, see `quantize_graph`.
        layers: the names of the layers to measure.
        images: the inputs of the graph for each image.
        advance: called after each layer.
    """
    wanted = predictions(model)
    expected, counts = run_predictions(model, wanted, images)
    disturbance = {}
    for layer in layers:
        places = [i for i, prediction in enumerate(wanted) if prediction.comparable_under(layer)]
        alone = quantize_graph(model, largest, {layer})
        noisy, _ = run_predictions(alone, [wanted[i] for i in places], images, counts)
        shares = [_noise(expected[i], rows) for i, rows in zip(places, noisy, strict=True)]
        disturbance[layer] = max(shares, default=0.0)
        advance()
    return disturbance


def _noise(expected: list[Array], noisy: list[Array]) -> float:
    power = noise = 0.0
    for a, b in zip(expected, noisy, strict=True):
        power += float(np.sum(np.square(a, dtype=np.float64)))
        noise += float(np.sum(np.square(a.astype(np.float64) - b)))
    return noise / power if power else math.inf if noise else 0.0


def costs(model: onnx.ModelProto, image: Feeds) -> dict[str, float]:
    """Returns the number of multiplications of each layer for one image.

    Args:
        model: the graph in fp32.
        image: the graph's inputs for the image.
    """
    layers = graph_layers(model)
    outputs = {
        model.graph.node[place].output[0]: layer for layer in layers for place in layer.nodes
    }
    dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    multiplications = dict.fromkeys((layer.name for layer in layers), 0.0)
    session = OrtSession(with_outputs(model, outputs).SerializeToString(), "cpu")
    for name, array in session.run(image).items():
        layer = outputs[name]
        weights = dims[layer.weight]
        positions = array.size / weights[layer.channel_axis]
        if layer.channel_axis == 1:  # A transposed convolution multiplies once per input,
            positions /= math.prod(weights[2:])  # and its kernel is as large as its stride.
        multiplications[layer.name] += math.prod(weights) * positions
    session.close()
    return multiplications


@dataclass(frozen=True, slots=True)
class Prediction:
    """A tensor from which predictions are decoded.

    Attributes:
        reading: the name of the input of the layer that computes it, see `comask.calib.qdq.Reading`.
        tensor: the tensor's name in the graph.
    """

    reading: str
    tensor: str

    def comparable_under(self, layer: str) -> bool:
        """Returns whether this tensor shows a disturbance by the layer in unchanged rows.

        The classifier decides which boxes the head receives, so only its own outputs are comparable.
        """
        return self.reading.startswith(CLASSIFIER) == layer.startswith(CLASSIFIER)


def predictions(model: onnx.ModelProto) -> list[Prediction]:
    """Returns all tensors of a graph from which predictions are decoded, the pyramid first."""
    tensors = []
    for layer in graph_layers(model):
        for use, place in enumerate(layer.nodes):
            output = model.graph.node[place].output[0]
            if layer.name in LAST_LAYERS or output in PYRAMID:
                tensors.append(Prediction(f"{layer.name}:{use}" if use else layer.name, output))
    return sorted(tensors, key=lambda prediction: prediction.tensor not in PYRAMID)


def run_predictions(
    model: onnx.ModelProto,
    wanted: Sequence[Prediction],
    images: Sequence[Feeds],
    counts: list[int] | None = None,
) -> tuple[list[list[Array]], list[int]]:
    """Computes predictions on the CPU, by tensor and image: [rows, channels, …] without padding rows.

    Args:
        model: the graph, which may be quantised.
        wanted: the predictions of the fp32 graph.
        images: the inputs of the graph for each image.
        counts: the number of detections in each image from an earlier run; None for this run's.

    Returns:
        The predictions, and the number of detections in each image.
    """
    names = [prediction.tensor for prediction in wanted]
    stage2 = any(output.name == COUNT for output in model.graph.output)
    outputs = [*names, COUNT] if stage2 else names
    graph = with_outputs(model, outputs).SerializeToString()
    computed: list[list[Array]] = [[] for _ in wanted]
    session = OrtSession(graph, "cpu", optimized=False)
    seen = []
    for place, feeds in enumerate(images):
        results = session.run(feeds)
        seen.append(int(results[COUNT][0]) if stage2 else 0)
        count = seen[-1] if counts is None else counts[place]
        for rows, prediction in zip(computed, wanted, strict=True):
            array = results[prediction.tensor]
            if stage2 and prediction.reading.startswith(CLASSIFIER):
                array = array[feeds["proposal_scores"][0] > 0]
            elif stage2:
                array = array[:count]
            rows.append(array)
    session.close()
    return computed, seen


def with_outputs(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """Returns a copy of the model whose outputs are exactly these tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy
