"""Measures the AP of int8 candidates against PyTorch's AP, with the standard error of the difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from comask.bundle import Bundle
from comask.data.source import InstanceSource
from comask.errors import DataError, PrecisionError
from comask.evaluate import TASK_NAMES, CocoMetrics, Truth
from comask.runtime.backends.base import Stages
from comask.runtime.backends.pytorch import model_from_bundle, torch_stages
from comask.runtime.parity.scores import Scores, flat, labels_in_data, score_backend
from comask.runtime.predictor import Predictor

PARTS, ENOUGH = 5, 50  # A standard error needs this many parts, and this many images in all.
BATCH = 2  # For comask-r50, unoptimised ONNX Runtime takes 0.8 GiB per image of 800×1344.


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Images with annotations, and the AP that may be lost on them.

    Attributes:
        source: the source of the images.
        indices: the indices of the images to score.
        name: the data's name as the user gave it.
        budget: the AP points that boxes or masks may lose to PyTorch in fp32.
    """

    source: InstanceSource
    indices: list[int]
    name: str
    budget: float


class Scorer:
    """Scores candidates on the validation images.

    Args:
        bundle: the candidates' bundle, whose PyTorch weights are scored first.
        validation: the images and the budget.

    Attributes:
        validation: the images and the budget.
        reference: the AP of PyTorch in fp32.

    Raises:
        DataError: the data has other classes, no images, or no objects.
        PrecisionError: PyTorch detects nothing, so no loss can be measured.
    """

    def __init__(self, bundle: Bundle, validation: Validation) -> None:
        self.validation, self._manifest = validation, bundle.manifest
        self._labels = labels_in_data(bundle.manifest, validation.source)
        self._truth = Truth(validation.source, validation.indices)
        self.reference = self.measure(torch_stages(model_from_bundle(bundle)))
        if not has_objects(self.reference.ap):
            raise DataError(
                f"{validation.name} holds no objects, so AP cannot be measured; give other --data"
            )
        if not all(self.reference.ap.values()):
            raise PrecisionError(
                f"PyTorch itself has box AP {self.reference.ap['box']:.2f} and mask AP "
                f"{self.reference.ap['mask']:.2f} on {validation.name}: a loss cannot be measured; "
                "give other --data, or train longer"
            )

    def measure(self, stages: Stages) -> Measured:
        """Returns the AP of a backend."""
        with Predictor(
            stages,
            self._manifest.preprocess,
            mask_threshold=self._manifest.mask_threshold,
            max_batch=BATCH,
        ) as predictor:
            scores = score_backend(
                predictor, self._truth, self._labels, self._detections, f"scoring {stages.backend}"
            )
        self._truth = scores.truth  # only the images that could be decoded
        parts = PARTS if len(self._truth.indices) >= ENOUGH else 0
        return Measured(_points(scores.final), [self._part(scores, i) for i in range(parts)])

    def _part(self, scores: Scores, number: int) -> dict[str, float]:
        truth, results = scores.truth.of(scores.truth.indices[number::PARTS]), scores.results
        part = flat(results[number::PARTS])
        return _points(truth.score(part, detections=self._detections))

    @property
    def _detections(self) -> int:
        return self._manifest.model.detections


def has_objects(ap: Mapping[str, float]) -> bool:
    """Returns whether the data has objects: without them, AP is -1, which is -100 points."""
    return min(ap.values()) >= 0


def _points(metrics: CocoMetrics) -> dict[str, float]:
    return {name: 100 * metrics.values[task]["AP"] for task, name in TASK_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Measured:
    """AP in points.

    Attributes:
        ap: AP of `box` and `mask` on all images.
        parts: AP on disjoint fifths of the images; empty for too few images.
    """

    ap: dict[str, float]
    parts: list[dict[str, float]]

    def loss_of(self, other: Measured) -> tuple[float, float]:
        """Returns the AP points that `other` loses to this, of boxes or masks, whichever is worse.

        Returns:
            (points, standard error): the error of the mean over the parts, or 0 without parts.
        """
        losses = []
        for task, points in self.ap.items():
            differences = [
                a[task] - b[task]
                for a, b in zip(self.parts, other.parts, strict=True)
                if has_objects(a)
            ]
            few = len(differences) < 2
            error = 0 if few else float(np.std(differences, ddof=1)) / len(differences) ** 0.5
            losses.append((points - other.ap[task], error))
        return max(losses, key=sum)
