"""Scores the backends of a bundle, compares them with the first of them, and finds where they part."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Bundle
from comask.data.source import Id
from comask.errors import BackendUnavailableError, NotFiniteError
from comask.evaluate import Truth
from comask.preprocess import prepare
from comask.runtime.backends import LoadOptions
from comask.runtime.bench.machine import describe_machine
from comask.runtime.parity.causes import altered_preprocessing, altered_weights, explain_results
from comask.runtime.parity.layers import Trace, trace_graphs
from comask.runtime.parity.open_backends import looser, precision_of
from comask.runtime.parity.report import (
    SAME,
    ParityReport,
    Picture,
    points_of,
    side_by_side,
)
from comask.runtime.parity.scores import Results, Scores, flat, score_backend
from comask.runtime.parity.verdict import (
    IMAGES,
    LEAST_AGREEMENT,
    WORST,
    ApComparison,
    ImageAgreement,
    Verdict,
    agreement,
    ap_tolerance,
    compare_ap,
    compare_backends,
    shared,
)
from comask.runtime.predictor import Predictor

if TYPE_CHECKING:
    from comask.models.comask import CoMask

TRACED_SIDE = 320  # pixels of a traced image's shorter side at most: all layers' outputs are kept

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GraphCheck:
    """What the graphs of one ONNX Runtime backend hold.

    Attributes:
        altered: one sentence a tensor or scale that is not the network's.
        trace: layer by layer; None where nothing asked for it.
    """

    altered: list[str]
    trace: Trace | None

    @property
    def causes(self) -> list[str]:
        """The first layer that differs, or nothing."""
        return [self.trace.cause] if self.trace and self.trace.first else []

    @property
    def failures(self) -> list[str]:
        """One sentence on the first layer that differs, and one on what was altered."""
        more = len(self.altered) - 1
        rest = f" (and {more} more)" if more > 0 else ""
        return self.causes + [f"{sentence}{rest}" for sentence in self.altered[:1]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is compared on what.

    Attributes:
        bundle: of all backends.
        data: as the user named it.
        boxes: of the ground truth: `annotated`, or of the `mask`.
        how: the options with which the backends were opened.
        skipped: by name, why a backend did not open.
        truth: of the images.
        detections: of an image that count, where they are more than COCO's 100.
        labels: the data's label of each of the bundle's.
        tolerance: AP points for every contestant; None: by precision.
        trace: whether ONNX graphs are traced though nothing failed; int8 ones are in any case.
        altered_scales: what of the int8 graphs' scales is not the calibration's.
        draw: whether pictures of the worst disagreements are made.
    """

    bundle: Bundle
    data: str
    boxes: str
    how: LoadOptions
    skipped: dict[str, str]
    truth: Truth
    detections: int
    labels: NDArray[np.int64]
    tolerance: float | None
    trace: bool
    altered_scales: Sequence[str]
    draw: bool

    def run(
        self, predictors: Mapping[str, Predictor], foreign: Mapping[str, Results]
    ) -> tuple[ParityReport, dict[str, list[Picture]]]:
        """Scores all and compares them with the first.

        Args:
            predictors: by name.
            foreign: COCO results of other pipelines by name, of each image of `truth`.

        Returns:
            the report, and by contestant the images that differ most.
        """
        (first, reference), *others = predictors.items()
        base = self._score(first, reference)
        # the others are scored on what the first could decode
        judge = _Judge(dataclasses.replace(self, truth=base.truth), first, reference, base)
        judge.check_graphs(first)
        for name, predictor in others:
            judge.add_backend(name, predictor)
        decoded = set(base.truth.indices)
        for name, results in foreign.items():
            images = zip(self.truth.indices, results, strict=True)
            judge.add_results(name, [rows for index, rows in images if index in decoded])
        check = judge.checks.get(first, GraphCheck([], None))
        altered = [f"{first}: {sentence}" for sentence in check.causes + check.altered[:1]]
        report = ParityReport(
            bundle=str(self.bundle.folder),
            data=self.data,
            boxes=self.boxes,
            proposals=self.how.proposals,
            short_side=self.how.short_side,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=describe_machine(self.how.device),
            skipped=self.skipped,
            verification=self.bundle.manifest.verification,
            failures=altered_preprocessing(self.bundle) + altered,
            reference=first,
            images=base.final.images,
            not_decoded=len(self.truth.indices) - len(decoded),
            max_detections=base.final.max_detections,
            backends=judge.points,
            comparisons=judge.verdicts,
            weights={name: check.altered for name, check in judge.checks.items()},
            traces={name: check.trace for name, check in judge.checks.items() if check.trace},
        )
        return report, judge.pictures

    def _score(self, name: str, predictor: Predictor) -> Scores:
        return score_backend(
            predictor, self.truth, self.labels, self.detections, f"evaluating {name}"
        )


class _Judge:
    """Judges contestants by the reference, and collects what it finds.

    Args:
        evaluation: whose truth is that of the images which the reference could decode.
        first: name of the reference.
        reference: what the others are compared with.
        base: its scores.

    Attributes:
        points: of all, the reference's first.
        verdicts: on all others.
        pictures: of all others.
        checks: of the graphs of ONNX Runtime backends, where they could be read.
    """

    def __init__(
        self, evaluation: Evaluation, first: str, reference: Predictor, base: Scores
    ) -> None:
        self._evaluation, self._bundle = evaluation, evaluation.bundle
        self._truth, self._source = evaluation.truth, evaluation.truth.source
        self._first, self._reference, self._base = first, reference, base
        self._busiest = [base.truth.indices[place] for place in busiest(base)]
        self.points = {first: points_of(base)}
        self.verdicts: dict[str, Verdict] = {}
        self.pictures: dict[str, list[Picture]] = {}
        self.checks: dict[str, GraphCheck] = {}

    def add_backend(self, name: str, predictor: Predictor) -> None:
        """Scores and judges a backend; what computes NaN counts as finding nothing."""
        precision = looser(precision_of(name), precision_of(self._reference.stages.backend))
        stages, not_finite, differing = None, [], []
        try:
            scores = self._evaluation._score(name, predictor)
            images = [
                self._reference.prepare(self._source.image(index))
                for index in self._busiest[:IMAGES]
            ]
            stages = compare_backends(
                self._reference.stages,
                predictor.stages,
                images,
                self._bundle.manifest.model,
                precision,
            )
            rest = f" (and {stages.beyond - 1} more)" if stages.beyond > 1 else ""
            differing = [f"stage by stage, first: {text}{rest}" for text in stages.failures[:1]]
        except NotFiniteError as error:
            scores = self._scored([[] for _ in self._truth.indices])
            not_finite = [str(error)]
        ap = self._compare_ap(scores, precision)
        failures = not_finite + ap.failures + differing
        failures = self.check_graphs(name, failing=bool(failures)) + failures
        self._add(name, scores, ap, failures, self._shared(scores.results), stages=stages)

    def add_results(self, name: str, results: Results) -> None:
        """Scores and judges the COCO results of another pipeline, of each image of the truth."""
        scores = self._scored(results)
        ap = self._compare_ap(scores, "results")
        shares = self._shared(results)
        overall = agreement(shares)
        failures = ap.failures.copy()
        if overall < LEAST_AGREEMENT:
            failures.append(
                f"its detections agree with the reference's by {overall:.3f}, at least "
                f"{LEAST_AGREEMENT} is expected (1: the same)"
            )
        known = {category.id for category in self._source.categories}
        ids = [row["category_id"] for rows in results for row in rows]
        if unknown := [number for number in ids if number not in known]:
            failures.append(
                f"{len(unknown)} of {len(ids)} results have a category_id that the data lack "
                f"({_some(unknown)}; they have {_some(known)})"
            )
        mistakes = None
        if failures and ids:
            labels, indices = self._evaluation.labels, self._truth.indices
            cause, mistakes = explain_results(
                results, self._reference, self._source, indices, labels
            )
            failures = [cause] * bool(cause) + failures
        self._add(name, scores, ap, failures, shares, mistakes=mistakes)

    def check_graphs(self, name: str, *, failing: bool = False) -> list[str]:
        """Compares the weights of ONNX graphs, and where something fails (or by wish) every layer.

        int8 graphs are traced in any case: far from the network as they are, no other comparison of
        tensors judges them.

        Args:
            name: of a backend; those without ONNX graphs are passed over.
            failing: whether something failed already.

        Returns:
            failures, one sentence each.
        """
        if not name.startswith("onnxruntime"):
            return []
        precision = precision_of(name)
        try:
            network = self._network
        except BackendUnavailableError as error:
            if self._evaluation.trace:
                raise
            logger.warning("%s: weights are not compared: %s", name, error)
            return []
        altered = altered_weights(network, self._bundle, precision)
        if precision == "int8":
            altered += self._evaluation.altered_scales
        wanted = failing or altered or self._evaluation.trace or precision == "int8"
        self.checks[name] = check = GraphCheck(altered, self._trace(precision) if wanted else None)
        return check.failures

    @cached_property
    def _network(self) -> CoMask:
        """What graphs are compared with, whatever the reference is."""
        try:
            import onnx  # noqa: F401  # reads the graphs

            from comask.runtime.backends.pytorch import model_from_bundle
        except ImportError as error:
            raise BackendUnavailableError(
                f"looking into graphs needs torch and onnx ({error}): pip install 'comask[export]'"
            ) from error
        return model_from_bundle(self._bundle)

    def _trace(self, precision: str) -> Trace:
        """A trace of the busiest image."""
        config = self._bundle.manifest.preprocess
        if config.short_side > TRACED_SIDE:
            config = config.resized(TRACED_SIDE)
        image = prepare(self._source.image(self._busiest[0]), config)
        return trace_graphs(self._network, self._bundle, precision, image.canvas, image.size)

    def _scored(self, results: Results) -> Scores:
        """The worth of results that are there."""
        final = self._truth.score(flat(results), detections=self._evaluation.detections)
        return Scores(final=final, results=results, truth=self._truth)

    def _compare_ap(self, scores: Scores, kind: str) -> ApComparison:
        tolerance = self._evaluation.tolerance
        if tolerance is None:
            tolerance = ap_tolerance(self._bundle.manifest, kind)
        return compare_ap(scores.final, self._base.final, kind, tolerance)

    def _shared(self, results: Results) -> list[tuple[float, float]]:
        """What each image's detections and the reference's share."""
        return [shared(a, b) for a, b in zip(self._base.results, results, strict=True)]

    def _add(
        self,
        name: str,
        scores: Scores,
        ap: ApComparison,
        failures: list[str],
        shares: list[tuple[float, float]],
        **found: Any,
    ) -> None:
        """Keeps one contestant's points and verdict, and draws where it differs most.

        Args:
            name: of the contestant.
            scores: its scores.
            ap: how they differ from the reference's.
            failures: all of them, those of `ap` included.
            shares: what `_shared` gives.
            found: more of `Verdict`.
        """
        if self._base.final.detections and not scores.final.detections:
            failures = [*failures, "no detections at all, so nothing was compared"]
        values = [agreement([pair]) for pair in shares]
        indices = self._truth.indices
        worst = [
            ImageAgreement(
                place=i, file=self._source.info(indices[i]).file_name, agreement=values[i]
            )
            for i in np.argsort(values, kind="stable")[:WORST].tolist()
        ]
        self.points[name] = points_of(scores)
        self.verdicts[name] = Verdict(
            **vars(ap) | {"failures": failures},
            agreement=agreement(shares),
            worst_images=worst,
            **found,
        )
        self.pictures[name] = [
            side_by_side(
                self._source,
                indices[image.place],
                (self._first, self._base.results[image.place]),
                (name, scores.results[image.place]),
                image.agreement,
            )
            for image in worst
            if self._evaluation.draw and image.agreement < SAME
        ]


def _some(ids: Iterable[Id]) -> str:
    """A few ids, as the file has them."""
    return ", ".join(
        json.dumps(id_) for id_ in sorted(set(ids), key=lambda i: (str(type(i)), i))[:5]
    )


def busiest(base: Scores) -> list[int]:
    """Places of the images, those first in which the reference finds most: empty ones show little."""
    return sorted(range(len(base.results)), key=lambda i: -len(base.results[i]))
