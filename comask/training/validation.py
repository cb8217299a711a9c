"""Scores a model on validation images while it trains, and at the end also its second stage's gain."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comask.config import PreprocessConfig
from comask.data.source import InstanceSource
from comask.error_analysis import ErrorAnalysis, analyse
from comask.error_pictures import worst_pictures
from comask.evaluate import CocoMetrics, Truth, coco_results
from comask.files import write_whole
from comask.models.comask import CoMask
from comask.runtime.backends.pytorch import torch_stages
from comask.runtime.images import FOUND_AT
from comask.runtime.parity.scores import Results, detect, flat
from comask.runtime.predictor import Predictor
from comask.structures import Detections
from comask.training.distributed import Ranks, gather, share_from_first
from comask.training.figures import picture_grid

PICTURES = 8  # validation images drawn beside their ground truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The metrics of one evaluation.

    Attributes:
        final: the metrics of the model's result: refined boxes, and the masks of the second pass.
        first: the metrics of the unrefined boxes and the coarse masks of the first pass; None before the
            end of a run.
        plain: the metrics of boxes from the same cells with equal weights, of which only the boxes' AP is
            meaningful; None before the end of a run.
        errors: what is wrong with the model's result; None before the end of a run, and in all processes
            but the first.
    """

    final: CocoMetrics
    first: CocoMetrics | None = None
    plain: CocoMetrics | None = None
    errors: ErrorAnalysis | None = None

    @property
    def stages(self) -> dict[str, CocoMetrics]:
        """The metrics of the stages that were scored."""
        return {stage: metrics for stage in FOUND_AT if (metrics := getattr(self, stage))}


class Validator:
    """Scores models on some images of a source; every process predicts its share.

    Args:
        source: the source of images and ground truth.
        indices: the indices of the images to score.
        preprocess: resizing and padding.
        mask_threshold: the threshold of pasted masks.
        ranks: this process and the number of processes that train together.
        pictures: the folder for grids of ground truth beside predictions, and at the end of a run for
            pictures of the images with most errors; None for no pictures, and no analysis of errors.
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
        self._truth = Truth(source, indices)

    def __call__(self, model: CoMask, step: int, *, last: bool) -> Validation:
        """Scores `model`, which is in evaluation mode, after `step` optimiser steps.

        Images that cannot be decoded are logged and left out.

        Args:
            model: the model to score.
            step: the number of finished optimiser steps, for the pictures' names.
            last: whether to score also the first pass and the plain average, and to analyse the errors.
        """
        stages = list(FOUND_AT) if last else ["final"]
        drawn = set(self._indices[:PICTURES]) if self._pictures else set()
        results: dict[int, dict[str, list[dict[str, Any]]]] = {}
        pictured: dict[int, Detections] = {}
        mine = self._indices[self._ranks.rank :: self._ranks.world]
        predictor = Predictor(
            torch_stages(model, diagnostics=last),
            self._preprocess,
            mask_threshold=self._mask_threshold,
        )
        quiet = not self._ranks.first
        for index, found in detect(predictor, self._source, mine, "evaluating", quiet=quiet):
            results[index] = {
                stage: coco_results(self._source, index, found[stage]) for stage in stages
            }
            if index in drawn:
                pictured[index] = found["final"]
        parts = gather((results, pictured))
        if not self._ranks.first:
            return share_from_first(None)  # type: ignore[return-value]  # It is the first's Validation.
        every = {index: found for part, _ in parts for index, found in part.items()}
        truth = self._truth.of(sorted(every))
        by_stage = {stage: [every[index][stage] for index in truth.indices] for stage in stages}
        metrics = {
            stage: truth.score(flat(rows), detections=model.config.detections)
            for stage, rows in by_stage.items()
        }
        errors = None
        if self._pictures:
            shown = {index: d for _, pictures in parts for index, d in pictures.items()}
            order = sorted(shown)
            self._pictures.mkdir(parents=True, exist_ok=True)
            path = self._pictures / f"step-{step:06d}.png"
            picture_grid(self._source, order, [shown[i] for i in order], path)
            if last:
                errors = analyse(truth, by_stage["final"])
                self._draw_worst(errors, truth, by_stage["final"])
        scored = Validation(
            final=metrics["final"], first=metrics.get("first"), plain=metrics.get("plain")
        )
        return dataclasses.replace(share_from_first(scored), errors=errors)

    def _draw_worst(self, errors: ErrorAnalysis, truth: Truth, results: Results) -> None:
        """Writes `worst-1.jpg` and so on in place of those of an earlier evaluation."""
        assert self._pictures is not None
        for path in self._pictures.glob("worst-*.jpg"):
            path.unlink()
        drawn = worst_pictures(errors.tasks["segm"], truth, results)
        for number, picture in enumerate(drawn, start=1):
            write_whole(self._pictures / f"worst-{number}.jpg", picture.content)
