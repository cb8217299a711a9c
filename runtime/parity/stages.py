"""Two backends stage by stage on a few images; and is the preprocessing still the exported one?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from comask.bundle import WEIGHTS, Bundle
from comask.config import ModelConfig
from comask.preprocess import Prepared
from comask.runtime.compare import TOLERANCES, Comparison, compare_stages
from comask.runtime.session import Stages

IMAGES = 4  # of a data set, that are compared stage by stage
LISTED = 6  # failures: a broken graph has one for every box


def compare_backends(
    reference: Stages,
    other: Stages,
    images: Sequence[Prepared],
    model: ModelConfig,
    precision: str,
) -> dict[str, Any]:
    """What `compare_stages` finds on images one at a time.

    int8 is not judged by it: on a trained network a cell's confidence that rounds across its threshold
    moves a mask's pixel by 0.7. Boxes then find their partners by the tolerance of fp16, and
    `failures` is empty.

    Args:
        reference: usually PyTorch.
        other: the backend in question.
        images: to compare on.
        model: its thresholds.
        precision: whose tolerance counts.

    Returns:
        `Comparison` as a dictionary, with `images`, `judged` and `beyond`, how many failures there are;
        the first `LISTED` of them are kept.
    """
    tolerance = TOLERANCES.get(precision)
    found = Comparison()
    for image in images:
        compare_stages(
            reference,
            other,
            image.canvas[None],
            np.array([image.size], np.int32),
            nms_iou=model.nms_iou,
            score_threshold=model.score_threshold,
            tolerance=tolerance or TOLERANCES["fp16"],
            into=found,
            rpn_nms_iou=model.rpn_nms_iou,
        )
    if tolerance is None:
        found.failures.clear()
    values = dataclasses.asdict(found)
    beyond = values.pop("failures")
    return {
        "images": len(images), "judged": tolerance is not None, **values,
        "beyond": len(beyond), "failures": beyond[:LISTED],
    }  # fmt: skip


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
