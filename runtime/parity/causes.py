"""What explains a failure: weights or settings that were altered, and the usual mistakes of pipelines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comask.bundle import STAGES, WEIGHTS, Bundle
from comask.config import PreprocessConfig
from comask.data.source import InstanceSource
from comask.preprocess import Pixels, Prepared, padded_shape, prepare
from comask.runtime.backends.base import Array
from comask.runtime.compare import relative_error
from comask.runtime.parity.scores import Results, image_results
from comask.runtime.parity.verdict import agreement, shared
from comask.runtime.predictor import Predictor

if TYPE_CHECKING:
    import onnx

    from comask.models.comask import CoMask

START = "preprocessing differs: the normalised image, which backbone.conv1 reads, "

# Relative to a tensor's largest value. BatchNorm is folded in another order; f16 rounds by 2^-11, and
# int8's codes by half of 1/127 of a channel's largest value.
LIMITS = {"fp32": 1e-5, "fp16": 1e-3, "int8": 5e-3}

DIAGNOSED = 16  # images that are run again with every mistake

Preparation = Callable[[Pixels, PreprocessConfig], Prepared]
Change = Callable[[list[dict[str, Any]], Prepared], list[dict[str, Any]]]


def altered_preprocessing(bundle: Bundle) -> list[str]:
    """One sentence a setting in which the manifest contradicts what the weights were exported with.

    Bundles exported before the weights file told have none.

    Raises:
        BundleError: when the weights are missing or altered.
    """
    from safetensors import safe_open

    with safe_open(bundle.file(WEIGHTS), "numpy") as file:
        witness = (file.metadata() or {}).get("preprocess")
    if witness is None:
        return []
    exported = json.loads(witness)
    manifest = json.loads(json.dumps(dataclasses.asdict(bundle.manifest.preprocess)))
    return [
        f"preprocess.{name}: manifest {manifest.get(name)}, weights were exported with {value}"
        for name, value in exported.items()
        if manifest.get(name) != value
    ]


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


def explain_results(
    results: Results,
    reference: Predictor,
    source: InstanceSource,
    indices: Sequence[int],
    labels: NDArray[np.int64],
) -> tuple[str, dict[str, float]]:
    """Runs the reference under the usual mistakes and finds the one that these results share.

    Args:
        results: of `indices`.
        reference: what they should agree with.
        source: of the images.
        indices: of the images; `DIAGNOSED` of those with most results are run.
        labels: the data's label of each of the bundle's.

    Returns:
        a sentence, empty where no mistake removes half of the disagreement; and each one's agreement.
    """
    places = sorted(range(len(results)), key=lambda i: -len(results[i]))[:DIAGNOSED]
    results, indices = [results[i] for i in places], [indices[i] for i in places]
    images = [source.image(i) for i in indices]
    found: dict[str, float] = {}

    def measure(name: str, theirs: Results) -> None:
        found[name] = agreement(shared(a, b) for a, b in zip(theirs, results, strict=True))

    plain = [reference.prepare(image) for image in images]
    theirs = image_results(reference, source, indices, plain, labels)["final"]
    measure("no mistake", theirs)
    for name, change in AFTERWARDS.items():
        changed = [change(rows, image) for rows, image in zip(theirs, plain, strict=True)]
        measure(name, changed)
    for name, mistaken in BEFORE.items():
        prepared = [mistaken(image, reference.preprocess) for image in images]
        measure(name, image_results(reference, source, indices, prepared, labels)["final"])
    best = max(found, key=lambda name: found[name])
    if 1 - found[best] > (1 - found["no mistake"]) / 2:
        return "", found
    return (
        f"these results look like those of a pipeline with this mistake: {best} (agreement "
        f"{found[best]:.3f} with it, {found['no mistake']:.3f} without)"
    ), found


def _resized(interpolation: int) -> Preparation:
    def run(image: Pixels, config: PreprocessConfig) -> Prepared:
        import cv2

        plain = prepare(image, config)
        h, w = plain.size
        canvas = np.zeros_like(plain.canvas)
        canvas[:h, :w] = cv2.resize(image, (w, h), interpolation=interpolation)
        return dataclasses.replace(plain, canvas=canvas)

    return run


def _stretched(image: Pixels, config: PreprocessConfig) -> Prepared:
    """To a square that is as high as wide, whatever the image's shape."""
    import cv2

    side = padded_shape((config.short_side, config.short_side), config)
    canvas = np.asarray(cv2.resize(image, side[::-1]), np.uint8)
    return Prepared(side, (image.shape[0], image.shape[1]), canvas)


def _on_pixels(
    change: Callable[[NDArray[np.float64], PreprocessConfig], NDArray[np.float64]],
) -> Preparation:
    def run(image: Pixels, config: PreprocessConfig) -> Prepared:
        plain = prepare(image, config)
        changed = np.clip(change(plain.canvas.astype(np.float64), config), 0, 255)
        return dataclasses.replace(plain, canvas=changed.astype(np.uint8))

    return run


def _box_in_resized_pixels(rows: list[dict[str, Any]], image: Prepared) -> list[dict[str, Any]]:
    y, x = image.scale
    return [row | {"bbox": (np.array(row["bbox"]) * [x, y, x, y]).tolist()} for row in rows]


def _corners(rows: list[dict[str, Any]], image: Prepared) -> list[dict[str, Any]]:
    return [
        row | {"bbox": [*row["bbox"][:2], *np.add(row["bbox"][:2], row["bbox"][2:]).tolist()]}
        for row in rows
    ]


def _shifted(step: int) -> Change:
    def run(rows: list[dict[str, Any]], image: Prepared) -> list[dict[str, Any]]:
        return [
            row | {"category_id": row["category_id"] + step}
            for row in rows
            if isinstance(row["category_id"], int)  # names have no next one
        ]

    return run


# INTER_NEAREST and INTER_AREA of OpenCV, which is imported late
BEFORE: dict[str, Preparation] = {
    "channels reversed (BGR instead of RGB)": lambda image, config: prepare(
        np.ascontiguousarray(image[..., ::-1]), config
    ),
    "image stretched to a square instead of resized with its proportions": _stretched,
    "resize with antialiasing": _resized(3),
    "resize by nearest neighbour": _resized(0),
    "another size: half of short_side": lambda image, config: prepare(
        image, config.resized(max(1, config.short_side // 2))
    ),
    "another size: twice short_side": lambda image, config: prepare(
        image, config.resized(2 * config.short_side)
    ),
    "pixels scaled to 0..1, which the graph expects in 0..255": _on_pixels(lambda x, c: x / 255),
    "pixels normalised already, which the graph does itself": _on_pixels(
        lambda x, c: (x - np.array(c.mean)) / np.array(c.std)
    ),
    "mean taken off already, which the graph does itself": _on_pixels(
        lambda x, c: x - np.array(c.mean)
    ),
}
AFTERWARDS: dict[str, Change] = {
    "boxes in pixels of the resized image": _box_in_resized_pixels,
    "boxes as x1, y1, x2, y2 instead of x, y, width, height": _corners,
    "category ids one too low (labels instead of ids)": _shifted(-1),
    "category ids one too high": _shifted(1),
}
