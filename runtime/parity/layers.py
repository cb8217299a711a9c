"""Layer by layer: where an ONNX graph computes something else than the PyTorch network.

What each layer reads and what it gives are compared, so that a difference between two layers is told
from one inside a layer. The network is held to the graph (`layer_runs.py`), so each step is judged
alone, and int8 by the tolerance of fp16, in which its graphs compute whatever is not rounded to int8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comask.bundle import STAGES, Bundle
from comask.config import PreprocessConfig
from comask.runtime.compare import TOLERANCES, relative_error
from comask.runtime.parity.layer_runs import SIDES, ForcedNetwork, Key, Side, run_graph
from comask.runtime.session import Array

if TYPE_CHECKING:
    import onnx

    from comask.models.comask import CoMask

START = "preprocessing differs: the normalised image, which backbone.conv1 reads, "

IMAGE: Key = ("backbone.conv1", 0)  # reads the normalised image

# Relative to a tensor's largest value. BatchNorm is folded in another order; f16 rounds by 2^-11, and
# int8's codes by half of 1/127 of a channel's largest value.
LIMITS = {"fp32": 1e-5, "fp16": 1e-3, "int8": 5e-3}


def explain_input(
    image: Array,
    image_size: tuple[int, int],
    found: Array,
    preprocess: PreprocessConfig,
    tolerance: float,
) -> str:
    """A sentence on how `found` was made of `image`.

    Each channel is fitted as a·(r, g, b) + offset, which tells order, mean and deviation at once.

    Args:
        image: u8 [H, W, 3] on its canvas.
        image_size: (h, w) of the image on it.
        found: f32 [3, H, W], what the first convolution read.
        preprocess: what was expected.
        tolerance: relative error of a fit that explains `found`.
    """
    h, w = image_size
    pixels = image[:h, :w].reshape(-1, 3).astype(np.float64)
    inside = found[:, :h, :w].reshape(3, -1).T.astype(np.float64)
    design = np.concatenate((pixels, np.ones((len(pixels), 1))), axis=1)
    fit, *_ = np.linalg.lstsq(design, inside, rcond=None)
    if not relative_error(inside, design @ fit) <= tolerance:
        return START + (
            "is no normalisation of the pixels at their places: resized, cropped or moved in the graph"
        )
    factors, offsets = fit[:3].T, fit[3]  # [channel of the input, channel of the image]
    order = np.abs(factors).argmax(axis=1)
    factor = factors[np.arange(3), order]
    if not (factor > 0).all():
        return START + f"does not grow with the pixels: factors {_numbers(factor)}"
    mean, std = -offsets / factor, 1 / factor
    faults = []
    if order.tolist() == [2, 1, 0]:
        faults.append("has its channels reversed (BGR where RGB is expected)")
    elif order.tolist() != [0, 1, 2]:
        faults.append(f"takes its channels from {''.join('RGB'[i] for i in order)}, not RGB")
    wrong = _normalisation(mean, std, preprocess)
    if wrong:
        faults.append(wrong)
    if not faults:
        faults.append("is not zero outside the image")
    return START + " and ".join(faults)


def _normalisation(
    mean: NDArray[np.float64], std: NDArray[np.float64], preprocess: PreprocessConfig
) -> str:
    """What is wrong with a mean and deviation; empty where nothing is."""
    wanted = np.array(preprocess.mean), np.array(preprocess.std)
    zero, one = np.zeros(3), np.ones(3)
    usual = {
        "": wanted,
        "is not normalised (pixels of 0..255)": (zero, one),
        "is not normalised (pixels of 0..1)": (zero, 255 * one),
        "is scaled to -1..1 instead of normalised": (127.5 * one, 127.5 * one),
        "was scaled to 0..1 before a mean and deviation for 0..255": (255 * wanted[0], 255 * wanted[1]),
        "is normalised with mean and deviation in reversed order": (wanted[0][::-1], wanted[1][::-1]),
        "is not divided by the deviation": (wanted[0], one),
        "does not have the mean taken off": (zero, wanted[1]),
    }  # fmt: skip
    for sentence, (m, s) in usual.items():
        if np.allclose(std, s, rtol=0.02) and np.allclose(mean, m, rtol=0.02, atol=0.02 * s.max()):
            return sentence
    return (
        f"is normalised with mean {_numbers(mean)} and deviation {_numbers(std)}; the manifest has "
        f"{_numbers(wanted[0])} and {_numbers(wanted[1])}"
    )


def _numbers(values: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


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


def altered_weights(model: CoMask, bundle: Bundle, precision: str) -> list[str]:
    """One sentence a tensor of the graphs that differs from the network's.

    Scales and shifts of GroupNorm have other shapes in graphs, and are not compared.

    Args:
        model: fp32, in evaluation mode.
        bundle: with the graphs.
        precision: of the graphs.

    Raises:
        BundleError: when a graph is missing or altered.
    """
    import onnx

    from comask.models.backbone import fold_batch_norms

    network = deepcopy(model).cpu()
    fold_batch_norms(network.backbone)  # as in the graphs
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    expected = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    limit = LIMITS[precision]
    found = []
    for stage in STAGES:
        for name, value in _weights(onnx.load(bundle.graph(stage, precision))):
            error = relative_error(expected[name], value) if name in expected else float("inf")
            if not error <= limit:
                found.append(
                    f"{name} in {stage} is not the network's: off by {error:.2g} of its largest value, "
                    f"at most {limit:g} expected in {precision}"
                )
    return found


def _weights(model: onnx.ModelProto) -> Iterator[tuple[str, Array]]:
    """Tensors of a graph by their names in the network, f32; int8 ones dequantised."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    axes: Mapping[str, int] = {
        node.input[0]: attribute.i
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        for attribute in node.attribute
        if attribute.name == "axis"
    }
    for name, tensor in tensors.items():
        if not name.startswith("model.") or name.endswith((".scale", ".zero_point")):
            continue
        value = np.asarray(numpy_helper.to_array(tensor), np.float32)
        plain = name.removesuffix(".int8")
        if plain != name:
            scale = np.asarray(numpy_helper.to_array(tensors[f"{plain}.scale"]), np.float32)
            shape = [1] * value.ndim
            shape[axes[name]] = -1
            value = value * scale.reshape(shape)
        yield plain.removeprefix("model.").replace(".weight_bias", ".bias"), value
