"""Layer by layer: where an ONNX graph computes something else than the PyTorch network.

What each layer reads and what it gives are compared, so that a difference between two layers is told
from one inside a layer. The network is held to the graph (`forced_network.py`), so each step is judged
alone, and int8 by the tolerance of fp16, in which its graphs compute whatever is not rounded to int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from comask.bundle import STAGES, Bundle
from comask.runtime.compare import TOLERANCES
from comask.runtime.parity.forced_network import SIDES, ForcedNetwork, Side
from comask.runtime.parity.graph_layers import Key, run_graph
from comask.runtime.parity.normalisation import explain_input
from comask.runtime.session import Array

if TYPE_CHECKING:
    from comask.models.comask import CoMask

IMAGE: Key = ("backbone.conv1", 0)  # reads the normalised image


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one tensor of a graph lies off the network's.

    Attributes:
        stage: `stage1` or `stage2`.
        layer: name of the module that reads or gives it.
        use: counted from 0, where a module is used for several tensors.
        side: whether the layer reads it or gives it.
        relative: max|a-b| / max|a|.
    """

    stage: str
    layer: str
    use: int
    side: Side
    relative: float

    @property
    def tensor(self) -> str:
        """What to call it: `rpn.conv (use 2) output`."""
        return f"{self.layer}{f' (use {self.use + 1})' if self.use else ''} {self.side}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All layers of both graphs.

    Attributes:
        precision: of the graphs.
        limit: of relative errors.
        size: (h, w) of the image.
        differences: in the graphs' order.
        first: the first beyond the limit.
        cause: a sentence on it; empty without one.
    """

    precision: str
    limit: float
    size: tuple[int, int]
    differences: list[Difference]
    first: Difference | None
    cause: str


def trace_graphs(
    model: CoMask, bundle: Bundle, precision: str, image: Array, image_size: tuple[int, int]
) -> Trace:
    """Runs one image through the graphs, and the network beside them, and compares every layer.

    Stage 2 gets the network's stage 1 outputs, so that a fault in stage 1 hides none in stage 2.

    Args:
        model: fp32, in evaluation mode.
        bundle: with the graphs.
        precision: of the graphs.
        image: u8 [H, W, 3] on its canvas.
        image_size: (h, w) of the image on it.

    Raises:
        BundleError: when a graph is missing or altered.
    """
    import onnx

    from comask.runtime.torch_session import TorchSession

    graphs = {stage: onnx.load(bundle.graph(stage, precision)) for stage in STAGES}
    limit = TOLERANCES["fp16" if precision == "int8" else precision].relative
    network = ForcedNetwork(model)
    sizes = np.array([image_size], np.int32)
    pixels = {"images": image[None], "image_sizes": sizes}
    maps = TorchSession(model, "stage1").run(pixels)
    feeds = {"stage1": pixels, "stage2": {**maps, "image_sizes": sizes}}
    differences: list[Difference] = []
    cause = ""
    for stage, graph in graphs.items():
        diagnostics = any(output.name == "first_boxes" for output in graph.graph.output)
        found = run_graph(graph, feeds[stage])
        errors = network.compare(stage, feeds[stage], found, diagnostics)
        for key in found.layers:
            for side in SIDES:
                difference = Difference(
                    stage=stage, layer=key[0], use=key[1], side=side,
                    relative=errors.get((key, side), float("inf")),
                )  # fmt: skip
                if not difference.relative <= limit and not cause:
                    cause = _cause(difference, differences)
                    if (key, side) == (IMAGE, "input"):
                        read, preprocess = found.layers[key].given[0], bundle.manifest.preprocess
                        cause = explain_input(image, image_size, read, preprocess, limit)
                differences.append(difference)
    return Trace(
        precision=precision, limit=limit, size=image_size, differences=differences,
        first=next((d for d in differences if not d.relative <= limit), None), cause=cause,
    )  # fmt: skip


def _cause(first: Difference, before: Sequence[Difference]) -> str:
    """What the first difference says of the graph."""
    if first.side == "output":
        return (
            f"first tensor that diverges: {first.tensor} ({first.stage}), relative error "
            f"{first.relative:.2g}, though what the layer reads agrees ({before[-1].relative:.2g}): its "
            f"weights or attributes differ from the network's"
        )
    given = next((d.tensor for d in reversed(before) if d.side == "output"), "the graph's inputs")
    return (
        f"first tensor that diverges: {first.tensor} ({first.stage}), relative error "
        f"{first.relative:.2g}; every layer before it agrees, the last being {given}: an operation "
        f"between layers differs (normalisation, activation, addition, RoIAlign)"
    )
