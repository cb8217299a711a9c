"""A graph run piece by piece, so that only a few of its inner tensors are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[Any]

WANTED_AT_ONCE = 8  # wanted tensors a piece: fewer save little memory and cost sessions


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive nodes.

    Attributes:
        session: that runs them.
        inputs: tensors that they read from earlier pieces.
        outputs: tensors that are wanted or that later pieces read.
        done: tensors that no later piece reads.
    """

    session: onnxruntime.InferenceSession
    inputs: list[str]
    outputs: list[str]
    done: set[str]


class Pieces:
    """A graph in ONNX Runtime on the CPU that gives any tensors, each as soon as it is there.

    Extra outputs of the whole graph would all be in memory at its end; a piece's are freed when they
    have been looked at and no later piece needs them. The graph runs once all the same.

    Args:
        model: of which the nodes are in topological order, and every tensor's type is known.
        wanted: names of tensors, inputs and outputs of the graph among them.
    """

    def __init__(self, model: onnx.ModelProto, wanted: Iterable[str]) -> None:
        graph = model.graph
        self._wanted = set(wanted)
        known = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
        weights = {weight.name: weight for weight in graph.initializer}
        self._pieces: list[Piece] = []
        parts = _parts(graph.node, self._wanted)
        later: set[str] = set()  # what the pieces behind read; from the last piece to the first
        for nodes in reversed(parts):
            produced = [name for node in nodes for name in node.output if name]
            read = dict.fromkeys(name for node in nodes for name in node.input if name)
            inputs = [name for name in read if name not in weights and name not in produced]
            outputs = [name for name in produced if name in self._wanted or name in later]
            piece = onnx.helper.make_model(
                onnx.helper.make_graph(
                    nodes,
                    "piece",
                    [known[name] for name in inputs],
                    [known[name] for name in outputs],
                    [weights[name] for name in read if name in weights],
                ),
                opset_imports=model.opset_import,
                functions=model.functions,
                ir_version=model.ir_version,
            )
            done = {name for name in (*inputs, *outputs) if name not in later}
            self._pieces.append(Piece(_session(piece), inputs, outputs, done))
            later.update(inputs)
        self._pieces.reverse()

    def run(self, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        """The wanted tensors by name, inputs first, then in the order in which they are computed."""
        held = dict(feeds)
        yield from ((name, value) for name, value in feeds.items() if name in self._wanted)
        for piece in self._pieces:
            values = piece.session.run(piece.outputs, {name: held[name] for name in piece.inputs})
            held.update(zip(piece.outputs, values, strict=True))
            del values
            for name in piece.outputs:
                if name in self._wanted:
                    yield name, held[name]
            for name in piece.done:
                held.pop(name, None)


def _parts(nodes: Iterable[onnx.NodeProto], wanted: set[str]) -> list[list[onnx.NodeProto]]:
    """The nodes in parts that each produce up to `WANTED_AT_ONCE` of the tensors."""
    parts: list[list[onnx.NodeProto]] = [[]]
    count = 0
    for node in nodes:
        produced = len(wanted.intersection(node.output))
        if count and count + produced > WANTED_AT_ONCE:
            parts.append([])
            count = 0
        parts[-1].append(node)
        count += produced
    return parts


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; they are raised as well
    options.enable_cpu_mem_arena = False  # it would keep what was freed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # of idle pieces
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
