"""Scores a model on the validation images while it trains, and at the end what its second stage adds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comask.config import PreprocessConfig
from comask.data.source import InstanceSource
from comask.errors import ImageError
from comask.evaluate import CocoMetrics, Truth, coco_results
from comask.models.comask import CoMask
from comask.preprocess import Prepared
from comask.progress import Progress
from comask.runtime.predictor import FOUND_AT, Predictor
from comask.runtime.torch_session import torch_stages
from comask.structures import Detections
from comask.training.distributed import Ranks, gather, share_from_first
from comask.training.figures import picture_grid

PICTURES = 8  # validation images drawn beside their ground truth
CHUNK = 16  # images held in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What one evaluation found.

    Attributes:
        final: of the refined boxes and the masks of the second pass: the model's result.
        first: of the unrefined boxes and the coarse masks of the first pass; None before the end of a
            run.
        plain: of the boxes that the same cells give when all count alike, of which the boxes' AP alone
            has a meaning; None before the end of a run.
    """

    final: CocoMetrics
    first: CocoMetrics | None = None
    plain: CocoMetrics | None = None

    @property
    def stages(self) -> dict[str, CocoMetrics]:
        """The metrics by stage, of those that were scored."""
        return {stage: metrics for stage in FOUND_AT if (metrics := getattr(self, stage))}


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
        self._truth: Truth | None = None  # of the images that could be decoded last time

    def __call__(self, model: CoMask, step: int, *, last: bool) -> Validation:
        """Scores `model`, which is in evaluation mode, after `step` optimiser steps.

        Images that cannot be decoded are reported and not scored.

        Args:
            model: to score.
            step: for the pictures' names.
            last: also score what the second stage is to be compared with.
        """
        stages = list(FOUND_AT) if last else ["final"]
        drawn = set(self._indices[:PICTURES]) if self._pictures else set()
        results: dict[str, list[dict[str, Any]]] = {stage: [] for stage in stages}
        scored: list[int] = []
        pictured: dict[int, Detections] = {}
        mine = self._indices[self._ranks.rank :: self._ranks.world]
        with Progress("evaluating", len(mine), unit="images", quiet=not self._ranks.first) as bar:
            for index, found in self._predictions(model, mine, all_stages=last):
                scored.append(index)
                for stage, detections in found.items():
                    results[stage] += coco_results(self._source, index, detections)
                if index in drawn:
                    pictured[index] = found["final"]
                bar.advance()
        parts = gather((scored, results, pictured))
        if not self._ranks.first:
            return share_from_first(None)  # type: ignore[return-value]  # the first one's answer
        every = sorted(index for indices, _, _ in parts for index in indices)
        if self._truth is None or self._truth.indices != every:
            self._truth = Truth(self._source, every)
        metrics = {
            stage: self._truth.score(
                [result for _, found, _ in parts for result in found[stage]],
                detections=model.config.detections,
            )
            for stage in stages
        }
        if self._pictures:
            shown = {index: d for _, _, pictures in parts for index, d in pictures.items()}
            order = sorted(shown)
            self._pictures.mkdir(parents=True, exist_ok=True)
            path = self._pictures / f"step-{step:06d}.png"
            picture_grid(self._source, order, [shown[i] for i in order], path)
        return share_from_first(Validation(**metrics))

    def _predictions(
        self, model: CoMask, indices: list[int], *, all_stages: bool
    ) -> Iterator[tuple[int, dict[str, Detections]]]:
        """Image by image: its index, and the detections of each stage."""
        predictor = Predictor(
            torch_stages(model, diagnostics=all_stages),
            self._preprocess,
            mask_threshold=self._mask_threshold,
        )
        for start in range(0, len(indices), CHUNK):
            images = list(self._prepared(predictor, indices[start : start + CHUNK]))
            found = predictor.predict_stages([image for _, image in images])
            yield from zip((index for index, _ in images), found, strict=True)

    def _prepared(self, predictor: Predictor, indices: list[int]) -> Iterator[tuple[int, Prepared]]:
        for index in indices:
            try:
                yield index, predictor.prepare(self._source.image(index))
            except ImageError as error:
                print(f"warning: {error}; not evaluated", file=sys.stderr, flush=True)
