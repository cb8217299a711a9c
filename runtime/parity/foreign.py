"""Which usual mistake explains the COCO results of a pipeline of the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig
from comask.data.source import InstanceSource
from comask.preprocess import Pixels, Prepared, padded_shape, prepare
from comask.runtime.parity.judge import agreement, shared
from comask.runtime.parity.scores import Results, image_results
from comask.runtime.predictor import Predictor

DIAGNOSED = 16  # images that are run again with every mistake

Preparation = Callable[[Pixels, PreprocessConfig], Prepared]
Change = Callable[[list[dict[str, Any]], Prepared], list[dict[str, Any]]]


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
    return Prepared(canvas, side, (image.shape[0], image.shape[1]))


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
