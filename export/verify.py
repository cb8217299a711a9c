"""Proof that exported graphs compute what the network computes, before a bundle is released."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.config import ModelConfig, PreprocessConfig
from comask.errors import ParityError
from comask.preprocess import Prepared, prepare
from comask.runtime.compare import Comparison, Tolerance, compare_stages
from comask.runtime.session import Stages

# Canvases, as shares of the configured size: whole, a smaller one, and a strip.
SCALES = ((1.0, 1.0), (0.5, 0.5), (1.0, 0.25))

Batch = Sequence[Prepared]


def verify(
    reference: Stages,
    other: Stages,
    batches: Sequence[Batch],
    model: ModelConfig,
    tolerance: Tolerance,
) -> dict[str, Any]:
    """Runs images through both and compares every output.

    Args:
        reference: the network in PyTorch, fp32.
        other: its graphs, or itself in another precision.
        batches: each of images of one canvas.
        model: its thresholds.
        tolerance: for the other's precision.

    Returns:
        the worst differences, for the manifest.

    Raises:
        ParityError: naming the first output that differs.
    """
    comparison = Comparison()
    for batch in batches:
        compare_stages(
            reference,
            other,
            np.stack([image.canvas for image in batch]),
            np.array([image.size for image in batch], dtype=np.int32),
            nms_iou=model.nms_iou,
            score_threshold=model.score_threshold,
            tolerance=tolerance,
            into=comparison,
            rpn_nms_iou=model.rpn_nms_iou,
        )
    if comparison.failures:
        rest = len(comparison.failures) - 1
        raise ParityError(
            f"{other.backend} does not compute what PyTorch does in fp32: {comparison.failures[0]}"
            + (f" (and {rest} more differences)" if rest else "")
        )
    result = dataclasses.asdict(comparison)
    del result["failures"]
    return {"reference": reference.backend, "backend": other.backend, **result}


def verification_batches(
    images: Sequence[NDArray[np.uint8]], preprocess: PreprocessConfig
) -> list[Batch]:
    """Every image alone at its own size, then smaller and narrower; at last two on one canvas.

    Args:
        images: u8 [h, w, 3], RGB.
        preprocess: from an image to the first graph's input.
    """
    batches: list[Batch] = []
    for image in images:
        for y, x in SCALES:
            size = dataclasses.replace(
                preprocess,
                short_side=max(1, int(preprocess.short_side * min(y, x))),
                max_side=max(1, int(preprocess.max_side * max(y, x))),
            )
            cut = image[: max(1, int(image.shape[0] * y)), : max(1, int(image.shape[1] * x))]
            batches.append([prepare(np.ascontiguousarray(cut), size)])
    first = prepare(images[0], preprocess)
    mirrored = dataclasses.replace(
        first, canvas=np.ascontiguousarray(first.canvas[:, ::-1]), size=first.canvas.shape[:2]
    )
    batches.append([first, mirrored])
    return batches
