"""The precision search: which layers leave int8 so that AP stays within a budget.

Layers stay float in the order of how much their quantisation alone disturbs the outputs: one, two, four
and so on until the budget is met, then fewer by bisection, since each trial costs an evaluation. Then
single layers, the dearest first, are sent back to int8 where the budget allows it.

A disturbance is measured on what a graph's predictions are decoded from, before NMS turns any noise into
other rows: the pyramid and the RPN's raw outputs in stage 1; class, mask and offset logits in stage 2.
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
    "head.offsets", "fine_head.mask",
)  # fmt: skip
CLASSIFIER = "classifier."
COUNT = "num_detections"

Feeds = Mapping[str, Array]
Loss = Callable[[frozenset[str]], float]


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation.

    Attributes:
        float_layers: those that were not int8.
        loss: AP points lost to the reference, the larger one of boxes and masks.
    """

    float_layers: frozenset[str]
    loss: float


@dataclass(slots=True)
class Search:
    """Looks for the cheapest set of layers that must stay float.

    Args:
        loss: AP points that must be expected to be lost when these layers stay float and all others
            are int8.
        budget: the most that may be lost.

    Attributes:
        trials: in their order.
    """

    loss: Loss
    budget: float
    trials: list[Trial] = field(default_factory=list)

    def try_all_int8(self) -> bool:
        """Whether nothing need stay float."""
        return self._fits(frozenset())

    def run(
        self, disturbance: Mapping[str, float], cost: Mapping[str, float], sent_back: int = 6
    ) -> frozenset[str]:
        """The layers that stay float.

        Args:
            disturbance: of each layer, by which they are ordered.
            cost: of each layer in float, in any unit.
            sent_back: trials of returning a layer to int8.

        Raises:
            PrecisionError: when the budget is not met even with every layer float.
        """
        order = sorted(disturbance, key=lambda name: (-disturbance[name], name))
        if not self._fits(frozenset(order)):
            raise PrecisionError(
                f"the AP budget of {self.budget:g} points cannot be met: with every layer in fp16 "
                f"{self.trials[-1].loss:.2f} points must be expected to be lost, the standard error "
                "included; give a larger --ap-budget or more --val-images, or look for the fault with "
                "comask-eval"
            )
        low, high = 0, 1  # `high` layers are enough, `low` are not
        while high < len(order) and not self._fits(frozenset(order[:high])):
            low, high = high, min(2 * high, len(order))
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(frozenset(order[:middle])):
                high = middle
            else:
                low = middle
        kept = frozenset(order[:high])
        # the last of them is what tipped the scales
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


@dataclass(frozen=True, slots=True)
class Prediction:
    """One tensor of a graph.

    Attributes:
        reading: name of what the layer that gives it reads, see `comask.calib.qdq.Reading`.
        tensor: its name in the graph.
    """

    reading: str
    tensor: str

    def comparable_under(self, layer: str) -> bool:
        """Whether a disturbance of this layer shows here, in rows that stay the same.

        The classifier decides which boxes the head looks at, so it is judged by its own outputs.
        """
        return self.reading.startswith(CLASSIFIER) == layer.startswith(CLASSIFIER)


def predictions(model: onnx.ModelProto) -> list[Prediction]:
    """All of a graph, the pyramid first."""
    found = []
    for layer in graph_layers(model):
        for use, place in enumerate(layer.nodes):
            output = model.graph.node[place].output[0]
            if layer.name in LAST_LAYERS or output in PYRAMID:
                found.append(Prediction(f"{layer.name}:{use}" if use else layer.name, output))
    return sorted(found, key=lambda prediction: prediction.tensor not in PYRAMID)


def run_predictions(
    model: onnx.ModelProto,
    wanted: Sequence[Prediction],
    images: Sequence[Feeds],
    counts: list[int] | None = None,
) -> tuple[list[list[Array]], list[int]]:
    """Predictions on the CPU, by tensor and image: [rows, channels, …] without padding's rows.

    Args:
        model: the graph, which may be quantised.
        wanted: of its fp32 form.
        images: inputs of the graph, an entry an image.
        counts: of detections in each image, as a run before gave them; None: as this one does.

    Returns:
        the predictions, and the counts.
    """
    names = [prediction.tensor for prediction in wanted]
    stage2 = any(output.name == COUNT for output in model.graph.output)
    outputs = [*names, COUNT] if stage2 else names
    graph = with_outputs(model, outputs).SerializeToString()
    found: list[list[Array]] = [[] for _ in wanted]
    session = OrtSession(graph, "cpu", optimized=False)
    seen = []
    for place, feeds in enumerate(images):
        results = session.run(feeds)
        seen.append(int(results[COUNT][0]) if stage2 else 0)
        count = seen[-1] if counts is None else counts[place]
        for rows, prediction in zip(found, wanted, strict=True):
            array = results[prediction.tensor]
            if stage2 and prediction.reading.startswith(CLASSIFIER):
                array = array[feeds["proposal_scores"][0] > 0]
            elif stage2:
                array = array[:count]
            rows.append(array)
    session.close()
    return found, seen


def with_outputs(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy that gives these tensors as outputs, and nothing else."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy
