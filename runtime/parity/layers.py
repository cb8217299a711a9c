"""Layer by layer: where an ONNX graph first computes something else than the PyTorch network.

A layer goes by the name of its module, as `backbone.layer1.0.conv1`, in both. What it reads and what it
gives are compared, so that a difference between two layers is told from one inside a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from comask.runtime.compare import relative_error
from comask.runtime.parity.normalisation import explain_input
from comask.runtime.session import Array

from comask.bundle import STAGES, Bundle

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

    from comask.models.comask import CoMask

LAYERS = ("Conv", "ConvTranspose", "Gemm")
IMAGE = "backbone.conv1"  # reads the normalised image

Side = Literal["input", "output"]
Key = tuple[str, int]  # a module's name, and which of its uses


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
        tolerance: largest relative error; None: there is none for this precision.
        size: (h, w) of the image.
        differences: in the graphs' order.
        first: the first beyond the tolerance.
        cause: a sentence on it; empty without one.
    """

    precision: str
    tolerance: float | None
    size: tuple[int, int]
    differences: list[Difference]
    first: Difference | None
    cause: str


def trace_graphs(
    model: CoMask,
    bundle: Bundle,
    precision: str,
    image: Array,
    image_size: tuple[int, int],
    tolerance: float | None,
) -> Trace:
    """Runs one image through the network and its graphs and compares every layer.

    Graphs run on the CPU as the files have them, without ONNX Runtime's optimiser. Stage 2 gets the
    network's stage 1 outputs and, since rounding may exchange near-equal detections, its RoIs.

    Args:
        model: fp32, in evaluation mode.
        bundle: with the graphs.
        precision: of the graphs.
        image: u8 [H, W, 3] on its canvas.
        image_size: (h, w) of the image on it.
        tolerance: for the precision; None where there is none.

    Raises:
        BundleError: when a graph is missing or altered.
    """
    import onnx

    graphs = {stage: onnx.load(bundle.graph(stage, precision)) for stage in STAGES}
    diagnostics = any(output.name == "first_boxes" for output in graphs["stage2"].graph.output)
    feeds = {"images": image[None], "image_sizes": np.array([image_size], np.int32)}
    recorded = _Recorder(model)
    differences: list[Difference] = []
    normalised: Array | None = None
    for stage in STAGES:
        stage_outputs = recorded.run(stage, feeds, diagnostics and stage == "stage2")
        found = _graph_tensors(graphs[stage], feeds, recorded.rois)
        for key, side, value in found:
            wanted = recorded.tensors.get((*key, side))
            error = float("inf") if wanted is None else relative_error(wanted, value)
            differences.append(
                Difference(stage=stage, layer=key[0], use=key[1], side=side, relative=error)
            )
            if (key, side) == ((IMAGE, 0), "input"):
                normalised = value
        feeds = {**stage_outputs, "image_sizes": feeds["image_sizes"]}
    first = None
    if tolerance is not None:
        first = next((d for d in differences if not d.relative <= tolerance), None)
    cause = ""
    if first is not None:
        cause = _cause(first, differences)
        if (first.layer, first.side) == (IMAGE, "input") and normalised is not None:
            preprocess = bundle.manifest.preprocess
            cause = explain_input(image, image_size, normalised[0], preprocess, tolerance or 0.0)
    return Trace(
        precision=precision, tolerance=tolerance, size=image_size,
        differences=differences, first=first, cause=cause,
    )  # fmt: skip


def _cause(first: Difference, differences: Sequence[Difference]) -> str:
    """What the first difference says of the graph."""
    before = differences[: differences.index(first)]
    if first.side == "output":
        read = next(d for d in reversed(before) if (d.layer, d.use) == (first.layer, first.use))
        return (
            f"first tensor that diverges: {first.tensor} ({first.stage}), relative error "
            f"{first.relative:.2g}, though what the layer reads agrees ({read.relative:.2g}): its "
            f"weights or attributes differ from the network's"
        )
    given = next((d.tensor for d in reversed(before) if d.side == "output"), "the graph's inputs")
    return (
        f"first tensor that diverges: {first.tensor} ({first.stage}), relative error "
        f"{first.relative:.2g}; every layer before it agrees, the last being {given}: an operation "
        f"between layers differs (normalisation, activation, RoIAlign)"
    )


class _Recorder:
    """What each layer of the network reads and gives, and the RoIs that it pools.

    Args:
        model: stays as it is.
    """

    def __init__(self, model: CoMask) -> None:
        from torch import nn

        from comask.models.backbone import fold_batch_norms

        self._model = deepcopy(model).cpu()
        fold_batch_norms(self._model.backbone)  # as in the graphs
        self.tensors: dict[tuple[str, int, Side], Array] = {}
        self.rois: list[Array] = []
        self._uses: Counter[str] = Counter()
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.register_forward_hook(self._hook(name))
        self._pool = self._model.pool
        self._model.pool = self._record_rois  # type: ignore[method-assign]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            # copies: what follows may be in place
            self.tensors[name, self._uses[name], "input"] = arguments[0].numpy().copy()
            self.tensors[name, self._uses[name], "output"] = output.numpy().copy()
            self._uses[name] += 1

        return record

    def _record_rois(self, pyramid: list[Tensor], rois: Tensor, size: int) -> Tensor:
        self.rois.append(rois.numpy().copy())
        return self._pool(pyramid, rois, size)

    def run(self, stage: str, feeds: Mapping[str, Array], diagnostics: bool) -> dict[str, Array]:
        """Runs a stage; `tensors` and `rois` then are those of this stage."""
        import torch

        self.tensors.clear()
        self.rois.clear()
        self._uses.clear()
        options = {"diagnostics": True} if diagnostics else {}
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
            outputs = getattr(self._model, stage)(**tensors, **options)
        return {name: value.numpy() for name, value in outputs.items()}


def _graph_tensors(
    model: onnx.ModelProto, feeds: Mapping[str, Array], rois: Sequence[Array]
) -> Iterator[tuple[Key, Side, Array]]:
    """What each layer of a graph reads and gives, f32, in the graph's order."""
    import onnxruntime

    places = _layer_tensors(model)
    given = {entry.name for entry in model.graph.input}
    feeds = {name: feeds[name] for name in given} | _take_rois(model, rois, given)
    there = {entry.name for entry in model.graph.output} | given
    for name in dict.fromkeys(tensor for _, _, tensor in places):
        if name not in there:
            model.graph.output.add().name = name
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    types = {entry.name: entry.type for entry in session.get_inputs()}
    feeds = {
        name: value.astype(np.float16) if types[name] == "tensor(float16)" else value
        for name, value in feeds.items()
    }
    names = [name for name in dict.fromkeys(tensor for _, _, tensor in places) if name not in given]
    values = {**feeds, **dict(zip(names, session.run(names, feeds), strict=True))}
    for key, side, tensor in places:
        yield key, side, np.asarray(values[tensor], np.float32)


def _layer_tensors(model: onnx.ModelProto) -> list[tuple[Key, Side, str]]:
    """Layers with the names of the tensors that they read and give; int8 weights are dequantised."""
    uses: Counter[str] = Counter()
    found: list[tuple[Key, Side, str]] = []
    for node in model.graph.node:
        if node.op_type not in LAYERS or not node.input[1].startswith("model."):
            continue
        weight = node.input[1].removesuffix(".dequantized")
        name = weight.removeprefix("model.").removesuffix(".weight")
        key = (name, uses[name])
        uses[name] += 1
        found += [(key, "input", node.input[0]), (key, "output", node.output[0])]
    return found


def _take_rois(model: onnx.ModelProto, rois: Sequence[Array], given: set[str]) -> dict[str, Array]:
    """Makes RoIs that the graph computes inputs of it, and adds their names to `given`."""
    import onnx

    pools = [node for node in model.graph.node if node.op_type == "PyramidRoiAlign"]
    feeds = {}
    for number, (node, value) in enumerate(zip(pools, rois, strict=True)):
        if node.input[4] in given:
            continue
        name = f"rois.{number}"
        node.input[4] = name
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape)
        )
        given.add(name)
        feeds[name] = value
    return feeds
