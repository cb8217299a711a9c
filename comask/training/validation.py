"""Scores a model on the validation images while it trains, and what its collaboration adds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comask.config import PreprocessConfig
from comask.data.source import InstanceSource
from comask.errors import ImageError
from comask.evaluate import CocoMetrics, coco_results, score
from comask.models.comask import CoMask
from comask.preprocess import Prepared
from comask.progress import Progress
from comask.runtime.predictor import Predictor
from comask.runtime.torch_session import torch_stages
from comask.structures import Detections
from comask.training.distributed import Ranks, gather, share_from_first
from comask.training.pictures import picture_grid

PICTURES = 8  # validation images drawn beside their ground truth
CHUNK = 16  # images held in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What one evaluation found.

    Attributes:
        final: of the refined boxes and the masks of the second pass: the model's result.
        first: of the unrefined boxes and the coarse masks of the first pass.
    """

    final: CocoMetrics
    first: CocoMetrics


class Validator:
    """Scores models on some images of a source; every process predicts its share.

    Args:
        source: with the ground truth.
        indices: which images.
        preprocess: resize and padding.
        mask_threshold: of the pasted masks.
        ranks: this process among its kind.
        pictures: folder of the grids of ground truth beside predictions; None draws none.
    """

    def __init__(
        self,
        source: InstanceSource,
        indices: list[int],
        preprocess: PreprocessConfig,
        *,
        mask_threshold: float,
        ranks: Ranks,
        pictures: Path | None,
    ) -> None:
        self._source, self._indices, self._preprocess = source, indices, preprocess
        self._mask_threshold, self._ranks, self._pictures = mask_threshold, ranks, pictures

    def __call__(self, model: CoMask, step: int) -> Validation:
        """Scores `model`, which is in evaluation mode, after `step` optimiser steps.

        Images that cannot be decoded are reported and not scored.
        """
        drawn = set(self._indices[:PICTURES]) if self._pictures else set()
        results: dict[str, list[dict[str, Any]]] = {"final": [], "first": []}
        scored: list[int] = []
        pictured: dict[int, Detections] = {}
        mine = self._indices[self._ranks.rank :: self._ranks.world]
        with Progress("evaluating", len(mine), unit="images", quiet=not self._ranks.first) as bar:
            for index, final, first in self._predictions(model, mine):
                scored.append(index)
                results["final"] += coco_results(self._source, index, final)
                results["first"] += coco_results(self._source, index, first)
                if index in drawn:
                    pictured[index] = final
                bar.advance()
        parts = gather((scored, results, pictured))
        if not self._ranks.first:
            return share_from_first(None)  # type: ignore[return-value]  # the first one's answer
        every = sorted(index for indices, _, _ in parts for index in indices)
        metrics = {
            stage: score(self._source, every, [r for _, found, _ in parts for r in found[stage]])
            for stage in results
        }
        if self._pictures:
            found = {index: d for _, _, pictures in parts for index, d in pictures.items()}
            shown = sorted(found)
            self._pictures.mkdir(parents=True, exist_ok=True)
            path = self._pictures / f"step-{step:06d}.png"
            picture_grid(self._source, shown, [found[i] for i in shown], path)
        return share_from_first(Validation(**metrics))

    def _predictions(
        self, model: CoMask, indices: list[int]
    ) -> Iterator[tuple[int, Detections, Detections]]:
        """Image by image: its index, the final detections, those of the first pass."""
        predictor = Predictor(
            torch_stages(model, diagnostics=True),
            self._preprocess,
            mask_threshold=self._mask_threshold,
        )
        for start in range(0, len(indices), CHUNK):
            images = list(self._prepared(predictor, indices[start : start + CHUNK]))
            for places, outputs in predictor.outputs([image for _, image in images]):
                batch = [images[i][1] for i in places]
                final = predictor.detections(outputs, batch)
                unrefined = {"boxes": outputs["first_boxes"], "masks": outputs["coarse_masks"]}
                first = predictor.detections({**outputs, **unrefined}, batch)
                yield from zip([images[i][0] for i in places], final, first, strict=True)

    def _prepared(self, predictor: Predictor, indices: list[int]) -> Iterator[tuple[int, Prepared]]:
        for index in indices:
            try:
                yield index, predictor.prepare(self._source.image(index))
            except ImageError as error:
                print(f"warning: {error}; not evaluated", file=sys.stderr, flush=True)
