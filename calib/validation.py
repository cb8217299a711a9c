"""What the promise of int8 is measured on: AP of a candidate against PyTorch's, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from comask.runtime.parity.scores import Scores, score_backend, score_results
from comask.runtime.predictor import Predictor
from numpy.typing import NDArray

from comask.data.source import InstanceSource

TASKS = {"bbox": "box", "segm": "mask"}
PARTS, LEAST_IN_PART = 5, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Images with annotations, and what may be lost on them.

    Attributes:
        source: of the images.
        indices: of those that count.
        name: as the user named the data.
        budget: AP points that boxes or masks may lose to PyTorch in fp32.
    """

    source: InstanceSource
    indices: list[int]
    name: str
    budget: float

    def measure(self, predictor: Predictor, labels: NDArray[np.int64], title: str) -> Measured:
        """AP of a predictor.

        Args:
            predictor: to score.
            labels: see `comask.runtime.parity.scores.labels_in_data`.
            title: of the progress that is shown.
        """
        scores = score_backend(predictor, self.source, self.indices, labels, title)
        return Measured(_points(scores), [self._part(scores, i) for i in range(self._parts)])

    @property
    def _parts(self) -> int:
        return PARTS if len(self.indices) >= PARTS * LEAST_IN_PART else 0

    def _part(self, scores: Scores, number: int) -> dict[str, float]:
        places = range(number, len(self.indices), PARTS)
        metrics = score_results(
            self.source, [self.indices[i] for i in places], [scores.results[i] for i in places]
        )
        return {name: 100 * metrics.values[task]["AP"] for task, name in TASKS.items()}


def _points(scores: Scores) -> dict[str, float]:
    return {name: 100 * scores.fine.values[task]["AP"] for task, name in TASKS.items()}


@dataclass(frozen=True, slots=True)
class Measured:
    """AP in points.

    Attributes:
        ap: of `box` and `mask` on all images.
        parts: the same on disjoint fifths of them; empty where there are too few images.
    """

    ap: dict[str, float]
    parts: list[dict[str, float]]

    def loss_of(self, other: Measured) -> tuple[float, float]:
        """What another one loses to this, of boxes or masks, whichever is worse.

        Returns:
            (points, their standard error): the error is that of the mean over the parts; 0 where there
            are none.
        """
        losses = []
        for task, points in self.ap.items():
            differences = [a[task] - b[task] for a, b in zip(self.parts, other.parts, strict=True)]
            error = (
                float(np.std(differences, ddof=1)) / len(differences) ** 0.5 if differences else 0
            )
            losses.append((points - other.ap[task], error))
        return max(losses, key=sum)
