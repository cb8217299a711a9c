"""Explains failures: altered weights or settings, and the usual mistakes of other pipelines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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

START = "preprocessing differs: the normalised image, which the backbone reads, "

# Differences relative to a tensor's largest value. The graphs fold BatchNorm in another order; f16 rounds
# by 2^-11, and int8's codes round by half of 1/127 of a channel's largest value.
LIMITS = {"fp32": 1e-5, "fp16": 1e-3, "int8": 5e-3}

DIAGNOSED = 16  # number of images that are run again with every mistake

Preparation = Callable[[Pixels, PreprocessConfig], Prepared]
Change = Callable[[list[dict[str, Any]], Prepared], list[dict[str, Any]]]


def altered_preprocessing(bundle: Bundle) -> list[str]:
    """Returns a sentence for each setting that differs between the manifest and the weights file.

    The weights files of older bundles have no settings; nothing is compared then.

    Raises:
        BundleError: if the weights are missing or were altered.
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
    """Returns a sentence for each tensor of the graphs that differs from the network's.

    Scales and shifts of GroupNorm have other shapes in graphs, and are not compared.

    Args:
        model: the fp32 network in evaluation mode.
        bundle: the bundle with the graphs.
        precision: the graphs' precision.

    Raises:
        BundleError: if a graph is missing or was altered.
    """
    import onnx

    from comask.models.comask import folded

    network = folded(model).cpu()  # the graphs have BatchNorm folded, too
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    expected = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    limit = LIMITS[precision]
    altered = []
    for stage in STAGES:
        for name, value in _weights(onnx.load(bundle.graph(stage, precision))):
            error = relative_error(expected[name], value) if name in expected else float("inf")
            if not error <= limit:
                altered.append(
                    f"{name} in {stage} is not the network's: off by {error:.2g} of its largest value, "
                    f"at most {limit:g} expected in {precision}"
                )
    return altered


def _weights(model: onnx.ModelProto) -> Iterator[tuple[str, Array]]:
    """Yields a graph's weights in f32 with their names in the network; int8 weights are dequantised."""
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
    """Returns a sentence on the preprocessing that made `found` from `image`.

    Each channel is fitted as a·(r, g, b) + offset, which tells order, mean and deviation at once.

    Args:
        image: u8 [H, W, 3] on its canvas.
        image_size: (h, w) of the image on the canvas.
        found: f32 [3, H, W], the input of the first convolution.
        preprocess: the expected preprocessing.
        tolerance: the largest relative error of a fit that explains `found`.
    """
    h, w = image_size
    pixels = image[:h, :w].reshape(-1, 3).astype(np.float64)
    inside = found[:, :h, :w].reshape(3, -1).T.astype(np.float64)
    design = np.concatenate((pixels, np.ones((len(pixels), 1))), axis=1)
    fit, *_ = np.linalg.lstsq(design, inside, rcond=None)
    if not relative_error(inside, design @ fit) <= tolerance:
        return START + (
            "is not a normalisation of the pixels at their places: the graph resizes, crops or moves them"
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
    """Returns what is wrong with a mean and deviation; empty if they are right."""
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
        "does not have the mean subtracted": (zero, wanted[1]),
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
    """Runs the reference with each of the usual mistakes and finds the one that these results share.

    Args:
        results: the results of the images in `indices`.
        reference: the predictor with which they should agree.
        source: the data set.
        indices: the images' indices; the `DIAGNOSED` images with most results are run.
        labels: the data's label for each of the bundle's labels.

    Returns:
        a sentence, empty if no mistake removes half of the disagreement; and the agreement with each.
    """
    places = sorted(range(len(results)), key=lambda i: -len(results[i]))[:DIAGNOSED]
    results, indices = [results[i] for i in places], [indices[i] for i in places]
    images = [source.image(i) for i in indices]
    agreements: dict[str, float] = {}

    def measure(name: str, theirs: Results) -> None:
        agreements[name] = agreement(shared(a, b) for a, b in zip(theirs, results, strict=True))

    plain = [reference.prepare(image) for image in images]
    theirs = image_results(reference, source, indices, plain, labels)["final"]
    measure("no mistake", theirs)
    for name, change in AFTERWARDS.items():
        changed = [change(rows, image) for rows, image in zip(theirs, plain, strict=True)]
        measure(name, changed)
    for name, mistaken in BEFORE.items():
        prepared = [mistaken(image, reference.preprocess) for image in images]
        measure(name, image_results(reference, source, indices, prepared, labels)["final"])
    best = max(agreements, key=lambda name: agreements[name])
    if 1 - agreements[best] > (1 - agreements["no mistake"]) / 2:
        return "", agreements
    return (
        f"these results look like those of a pipeline with this mistake: {best} (agreement "
        f"{agreements[best]:.3f} with it, {agreements['no mistake']:.3f} without)"
    ), agreements


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
    """Resizes an image to a square, whatever its proportions."""
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
            if isinstance(row["category_id"], int)  # ids that are names have no successor
        ]

    return run


# 0 and 3 are INTER_NEAREST and INTER_AREA of OpenCV, which is imported late
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
