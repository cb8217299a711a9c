"""Finds the first layer in which an ONNX graph computes something else than the PyTorch network.

The input and the output of each layer are compared, so that a difference between two layers is told from
one inside a layer. The network follows the graph (teacher forcing): each of its layers reads the input of
the graph's layer and passes on the output of the graph's layer. Each step is therefore judged on its own,
and differences do not add up. That matters in int8, where many small roundings lead far away from the
network although each step is right. The network takes the activations and weights that int8 rounds from
the graph. int8 is judged by the tolerance of fp16, because its graphs compute in fp16 whatever they do
not round to int8.

A layer has the name of its module, such as `backbone.layer1.0.conv1`, which the weight has in the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from comask.bundle import STAGES, Bundle
from comask.runtime.backends.base import Array
from comask.runtime.backends.ort import OrtSession
from comask.runtime.compare import relative_error
from comask.runtime.parity.causes import explain_input
from comask.runtime.tolerances import TOLERANCES

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

    from comask.models.comask import CoMask

LAYERS = ("Conv", "ConvTranspose", "Gemm")

Key = tuple[str, int]  # a module's name, and the number of its use

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")

# The layers that read the normalised image, of ResNet and of ConvNeXt.
IMAGE: tuple[Key, ...] = (("backbone.conv1", 0), ("backbone.features.0.0", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The difference between one tensor of a graph and the network's.

    Attributes:
        stage: `stage1` or `stage2`.
        layer: name of the module that reads or writes the tensor.
        use: the number of the use, from 0, of a module that is used several times.
        side: whether the tensor is the layer's input or output.
        relative: max|a-b| / max|a|.
        tensor: the name to show, such as `rpn.conv (use 2) output`.
    """

    stage: str
    layer: str
    use: int
    side: Side
    relative: float
    tensor: str = field(init=False)

    def __post_init__(self) -> None:
        use = f" (use {self.use + 1})" if self.use else ""
        object.__setattr__(self, "tensor", f"{self.layer}{use} {self.side}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The comparison of all layers of both graphs.

    Attributes:
        precision: the graphs' precision.
        limit: the largest relative error that passes.
        size: (h, w) of the image.
        differences: all differences in the graphs' order.
        first: the first difference beyond the limit; None if all are within it.
        cause: a sentence on the first difference; empty without a difference.
    """

    precision: str
    limit: float
    size: tuple[int, int]
    differences: list[Difference]
    first: Difference | None
    cause: str

    @property
    def worst(self) -> Difference:
        """The largest difference."""
        return max(self.differences, key=lambda difference: difference.relative)


def trace_graphs(
    model: CoMask, bundle: Bundle, precision: str, image: Array, image_size: tuple[int, int]
) -> Trace:
    """Runs one image through the graphs and the network, and compares every layer.

    Stage 2 gets the network's stage 1 outputs, so that a fault in stage 1 does not hide one in stage 2.

    Args:
        model: the fp32 network in evaluation mode.
        bundle: the bundle with the graphs.
        precision: the graphs' precision.
        image: u8 [H, W, 3] on its canvas.
        image_size: (h, w) of the image on the canvas.

    Raises:
        BundleError: if a graph is missing or was altered.
    """
    import onnx

    from comask.runtime.backends.pytorch import TorchStage

    graphs = {stage: onnx.load(bundle.graph(stage, precision)) for stage in STAGES}
    limit = TOLERANCES["fp16" if precision == "int8" else precision].relative
    network = ForcedNetwork(model)
    sizes = np.array([image_size], np.int32)
    pixels = {"images": image[None], "image_sizes": sizes}
    maps = TorchStage(model, "stage1").run(pixels)
    feeds = {"stage1": pixels, "stage2": {**maps, "image_sizes": sizes}}
    differences: list[Difference] = []
    first, cause = None, ""
    for stage, graph in graphs.items():
        diagnostics = any(output.name == "first_boxes" for output in graph.graph.output)
        computed = run_graph(graph, feeds[stage])
        errors = network.compare(stage, feeds[stage], computed, diagnostics)
        for key, tensors in computed.layers.items():
            for side in SIDES:
                difference = Difference(
                    stage=stage, layer=key[0], use=key[1], side=side,
                    relative=errors.get((key, side), float("inf")),
                )  # fmt: skip
                if first is None and not difference.relative <= limit:
                    first, cause = difference, _cause(difference, differences)
                    if key in IMAGE and side == "input":
                        preprocess = bundle.manifest.preprocess
                        cause = explain_input(
                            image, image_size, tensors.given[0], preprocess, limit
                        )
                differences.append(difference)
    return Trace(
        precision=precision, limit=limit, size=image_size, differences=differences, first=first,
        cause=cause,
    )  # fmt: skip


def _cause(first: Difference, before: Sequence[Difference]) -> str:
    """Returns a sentence on what the first difference says about the graph."""
    if first.side == "output":
        return (
            f"first tensor that diverges: {first.tensor} ({first.stage}), relative error "
            f"{first.relative:.2g}, although the layer's input agrees ({before[-1].relative:.2g}): its "
            f"weights or attributes differ from the network's"
        )
    given = next((d.tensor for d in reversed(before) if d.side == "output"), "the graph's inputs")
    return (
        f"first tensor that diverges: {first.tensor} ({first.stage}), relative error "
        f"{first.relative:.2g}; every layer before it agrees, the last being {given}: an operation "
        f"between layers differs (normalisation, activation, addition, RoIAlign)"
    )


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The f32 tensors of one use of a layer.

    Attributes:
        given: the input before int8 rounds it.
        read: the input with which the layer computes: `given`, in int8 layers after rounding.
        output: the output.
        weight: the weight with which the layer computes if int8 rounds it; else None.
    """

    given: Array
    read: Array
    output: Array
    weight: Array | None


@dataclass(frozen=True, slots=True)
class GraphTensors:
    """The tensors that a graph computed.

    Attributes:
        layers: the tensors of each layer, in the graph's order.
        shortcuts: for each residual block whose shortcut int8 rounds, the tensor that is added to the
            output of its last convolution.
        rois: [B, N, 4] of each RoIAlign, in the graph's order.
    """

    layers: dict[Key, LayerTensors]
    shortcuts: dict[str, Array]
    rois: list[Array]


def run_graph(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> GraphTensors:
    """Runs a graph on the CPU exactly as in its file, without ONNX Runtime's optimiser.

    Args:
        model: the graph; further outputs are added to it.
        feeds: the graph's inputs; further tensors are ignored.

    Raises:
        BackendUnavailableError: if onnxruntime is not installed.
        BundleError: if it cannot load the graph.
    """
    places, shortcuts = _layer_tensors(model), _shortcuts(model)
    pooled = [node.input[4] for node in model.graph.node if node.op_type == "PyramidRoiAlign"]
    known = {entry.name for entry in (*model.graph.input, *model.graph.output)}
    wanted = [name for names in places.values() for name in names if name]
    for name in dict.fromkeys([*wanted, *shortcuts.values(), *pooled]):
        if name not in known:
            model.graph.output.add().name = name
    session = OrtSession(model.SerializeToString(), "cpu", optimized=False)
    tensors = {**feeds, **session.run(feeds)}
    session.close()

    def value(name: str) -> Array:
        return np.asarray(tensors[name], np.float32)

    return GraphTensors(
        {
            key: LayerTensors(
                value(given), value(read), value(output), value(weight) if weight else None
            )
            for key, (given, read, output, weight) in places.items()
        },
        {block: value(name) for block, name in shortcuts.items()},
        [value(name) for name in pooled],
    )


def layer_of(node: onnx.NodeProto) -> str | None:
    """Returns the name of the module that a node computes in float or int8; None for other nodes."""
    if node.op_type not in LAYERS or not node.input[1].startswith("model."):
        return None
    weight: str = node.input[1].removesuffix(".dequantized")
    return weight.removeprefix("model.").removesuffix(".weight")


def _layers(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    for node in model.graph.node:
        if (name := layer_of(node)) is not None:
            yield name, node


def _layer_tensors(model: onnx.ModelProto) -> dict[Key, tuple[str, str, str, str | None]]:
    """Returns, for each layer, the names of the fields of `LayerTensors` in the graph."""
    producers = {name: node for node in model.graph.node for name in node.output}
    uses: Counter[str] = Counter()
    tensors: dict[Key, tuple[str, str, str, str | None]] = {}
    for name, node in _layers(model):
        given = node.input[0]
        for op_type in ("DequantizeLinear", "QuantizeLinear"):
            if given in producers and producers[given].op_type == op_type:
                given = producers[given].input[0]
        weight = node.input[1] if node.input[1] in producers else None
        tensors[name, uses[name]] = (given, node.input[0], node.output[0], weight)
        uses[name] += 1
    return tensors


def _shortcuts(model: onnx.ModelProto) -> dict[str, str]:
    """Returns the names of the shortcuts that int8 rounds, by residual block."""
    outputs = {node.output[0]: name for name, node in _layers(model)}
    rounded = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return {
        outputs[convolved].rpartition(".")[0]: added
        for node in model.graph.node
        if node.op_type == "Add"
        for convolved, added in (node.input, reversed(node.input))
        if convolved in outputs and added in rounded
    }


class ForcedNetwork:
    """A copy of a network on the CPU, whose layers read and pass on a graph's tensors.

    Args:
        model: the fp32 network in evaluation mode, which is not changed.
    """

    def __init__(self, model: CoMask) -> None:
        from torch import nn

        from comask.models.comask import folded

        self._model = folded(model).cpu()  # the graphs have BatchNorm folded, too
        self._graph = GraphTensors({}, {}, [])
        self._errors: dict[tuple[Key, Side], float] = {}
        self._uses: Counter[str] = Counter()
        for name, module in list(self._model.named_modules()):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                self._hold(name, module)
            elif hasattr(module, "downsample"):  # a residual block
                self._hold_shortcut(name, module)
        self._pool, self._pools = self._model.pool, 0
        self._model.pool = self._pool_as_graph  # type: ignore[method-assign]

    def compare(
        self, stage: str, feeds: Mapping[str, Array], graph: GraphTensors, diagnostics: bool
    ) -> dict[tuple[Key, Side], float]:
        """Compares each layer's tensors in a graph with the network's for the same inputs.

        Args:
            stage: `stage1` or `stage2`.
            feeds: the graph's inputs.
            graph: the tensors that it computed.
            diagnostics: whether the graph has the diagnostic outputs, for which more layers may run.

        Returns:
            max|a-b| / max|a| of each tensor, see `relative_error`; layers that the network does not run
            are missing.
        """
        import torch

        self._graph, self._pools = graph, 0
        self._errors.clear()
        self._uses.clear()
        options = {"diagnostics": True} if diagnostics else {}
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
            getattr(self._model, stage)(**tensors, **options)
        return dict(self._errors)

    def _hold(self, name: str, module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            key = name, self._uses[name]
            if key not in self._graph.layers:
                return None
            theirs, (own,) = self._graph.layers[key], arguments
            if theirs.weight is not None:
                module.weight.data = _forced(module.weight.data, theirs.weight)
            self._errors[key, "input"] = relative_error(own.numpy(), theirs.given)
            return (_forced(own, theirs.read),)

        def after(_: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
            key = name, self._uses[name]
            self._uses[name] += 1
            if key not in self._graph.layers:
                return None
            theirs = self._graph.layers[key].output
            self._errors[key, "output"] = relative_error(output.numpy(), theirs)
            return _forced(output, theirs)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _hold_shortcut(self, name: str, block: nn.Module) -> None:
        from torch import nn

        def theirs(module: nn.Module, arguments: Any, own: Tensor) -> Tensor:
            shortcuts = self._graph.shortcuts
            return _forced(own, shortcuts[name]) if name in shortcuts else own

        shortcut = block.downsample if isinstance(block.downsample, nn.Module) else nn.Identity()
        shortcut.register_forward_hook(theirs)
        block.downsample = shortcut  # an identity, if the block had none, is a place for the hook

    def _pool_as_graph(self, pyramid: list[Tensor], rois: Tensor, size: int) -> Tensor:
        theirs = self._graph.rois[self._pools]
        self._pools += 1
        return self._pool(pyramid, _forced(rois, theirs), size)


def _forced(own: Tensor, theirs: Array) -> Tensor:
    """Returns a copy of the graph's tensor, or the network's if the graph's has no use.

    It is a copy because the next operation may work in place.
    """
    import torch

    if theirs.shape != own.shape or not np.isfinite(theirs).all():
        return own
    return torch.tensor(theirs)
