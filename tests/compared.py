"""Compares two backends on raw canvases."""

from __future__ import annotations

import numpy as np

from comask.config import ModelConfig
from comask.preprocess import Prepared
from comask.runtime.backends.base import Stages
from comask.runtime.compare import Comparison, compare_stages
from comask.runtime.tolerances import Tolerance

MODEL = ModelConfig(num_classes=8, nms_iou=0.3, score_threshold=0.0)


def compare(
    reference: Stages, other: Stages, images: np.ndarray, sizes: np.ndarray, tolerance: Tolerance
) -> Comparison:
    """Images u8 [B, H, W, 3] and the sizes (h, w) of what lies on them, i32 [B, 2]."""
    batch = [
        Prepared(size=(h, w), original_size=(h, w), canvas=image)
        for image, (h, w) in zip(images, sizes.tolist(), strict=True)
    ]
    result = Comparison()
    compare_stages(reference, other, batch, MODEL, tolerance=tolerance, into=result)
    return result
