"""What a graph's predictions are decoded from, compared before NMS turns any noise into other rows.

That is the pyramid and the RPN's raw outputs in stage 1; class, mask and offset logits in stage 2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx

from comask.calib.qdq import graph_layers
from comask.runtime.compare import PYRAMID
from comask.runtime.ort_session import OrtSession
from comask.runtime.session import Array

LAST_LAYERS = (
    "rpn.objectness", "rpn.deltas", "classifier.logits", "classifier.deltas", "head.mask",
    "head.offsets", "fine_head.mask",
)  # fmt: skip
CLASSIFIER = "classifier."
COUNT = "num_detections"

Feeds = Mapping[str, Array]


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
