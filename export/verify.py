"""Proof that exported graphs compute what the network computes, before a bundle is released."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from comask.runtime.compare import Comparison, Tolerance, compare_stages
from comask.runtime.session import Stages
from numpy.typing import NDArray

from comask.config import ModelConfig, PreprocessConfig
from comask.errors import ParityError
from comask.preprocess import Prepared, prepare

# Canvases, as shares of the configured size: whole, a smaller one, and a strip.
SCALES = ((1.0, 1.0), (0.5, 0.5), (1.0, 0.25))


def verify(
    reference: Stages,
    exported: Stages,
    images: Sequence[NDArray[np.uint8]],
    model: ModelConfig,
    preprocess: PreprocessConfig,
) -> dict[str, Any]:
    """Runs real images through both, alone and as a batch, and compares every output.

    Args:
        reference: the network in PyTorch.
        exported: the graphs.
        images: u8 [h, w, 3], RGB.
        model: its thresholds.
        preprocess: from an image to the first graph's input.

    Returns:
        the worst differences, for the manifest.

    Raises:
        ParityError: naming the first output that differs.
    """
    comparison = Comparison()
    for batch in _batches(images, preprocess):
        compare_stages(
            reference,
            exported,
            np.stack([image.canvas for image in batch]),
            np.array([image.size for image in batch], dtype=np.int32),
            nms_iou=model.nms_iou,
            score_threshold=model.score_threshold,
            tolerance=Tolerance(),
            into=comparison,
        )
    if comparison.failures:
        rest = len(comparison.failures) - 1
        raise ParityError(
            f"the exported graphs do not compute what PyTorch does: {comparison.failures[0]}"
            + (f" (and {rest} more differences)" if rest else "")
        )
    result = dataclasses.asdict(comparison)
    del result["failures"]
    return {
        "reference": reference.backend,
        "backend": exported.backend,
        "images": len(images),
        **result,
    }


def _batches(
    images: Sequence[NDArray[np.uint8]], preprocess: PreprocessConfig
) -> list[list[Prepared]]:
    """Every image alone at its own size, then smaller and narrower, then two on one canvas."""
    batches = []
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
