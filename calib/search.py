"""The precision search: which layers leave int8 so that AP stays within a budget.

Layers stay float in the order of how much their quantisation alone disturbs the outputs: one, two, four
and so on until the budget is met, then fewer by bisection, since each trial costs an evaluation. Then
single layers, the dearest first, are sent back to int8 where the budget allows it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from comask.bundle import Bundle
from comask.calib.predictions import Feeds, predictions, run_predictions, with_outputs
from comask.calib.qdq import graph_layers, quantize_graph
from comask.errors import PrecisionError
from comask.runtime.bench.timing import take_turns
from comask.runtime.ort_session import OrtSession
from comask.runtime.predictor import Predictor
from comask.runtime.session import Array
from comask.runtime.trt.engine_folder import EngineFolder
from comask.runtime.trt.session import open_engines

Loss = Callable[[frozenset[str]], float]

RUNS = 50


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


def measure_speed(
    bundle: Bundle, engines: Mapping[str, EngineFolder], images: Sequence[NDArray[np.uint8]]
) -> dict[str, float]:
    """Median seconds an image in both graphs, by precision; the engines take turns.

    Args:
        bundle: of the engines.
        engines: that run here, by precision.
        images: u8 [h, w, 3], RGB.
    """
    alone = [[image] for image in images]
    with contextlib.ExitStack() as stack:
        predictors = {
            precision: stack.enter_context(
                Predictor(open_engines(folder, device=0), bundle.manifest.preprocess, max_batch=1)
            )
            for precision, folder in engines.items()
        }
        measured = take_turns(predictors, dict.fromkeys(predictors, alone), runs=RUNS)
    return {
        precision: float(np.median(np.add(found.seconds["stage1"], found.seconds["stage2"])))
        for precision, found in measured.items()
    }


def require_faster(seconds: Mapping[str, float]) -> None:
    """Refuses int8 that gains nothing.

    Raises:
        PrecisionError: when it takes as long as fp16.
    """
    if seconds["int8"] >= seconds["fp16"]:
        raise PrecisionError(
            f"int8 is not faster than fp16 on this GPU: {1e3 * seconds['int8']:.2f} ms an image against "
            f"{1e3 * seconds['fp16']:.2f} ms; its engines are removed, use fp16"
        )
