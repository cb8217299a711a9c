"""Scores a bundle's backends, compares them with the first one, and finds where they diverge."""

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
from comask.error_analysis import analyse
from comask.error_pictures import Picture, worst_pictures
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

# largest shorter side of a traced image in pixels, since the outputs of all layers are kept in memory
TRACED_SIDE = 320

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GraphCheck:
    """The result of checking the graphs of one ONNX Runtime backend.

    Attributes:
        altered: one sentence for each tensor or scale that differs from the network's.
        trace: the comparison layer by layer; None if it was not needed.
    """

    altered: list[str]
    trace: Trace | None

    @property
    def causes(self) -> list[str]:
        """A sentence on the first layer that differs; empty if none does."""
        return [self.trace.cause] if self.trace and self.trace.first else []

    @property
    def failures(self) -> list[str]:
        """A sentence on the first layer that differs, and one on altered tensors."""
        more = len(self.altered) - 1
        rest = f" (and {more} more)" if more > 0 else ""
        return self.causes + [f"{sentence}{rest}" for sentence in self.altered[:1]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The inputs and options of a comparison.

    Attributes:
        bundle: the bundle of all backends.
        data: the data set, as the user named it.
        boxes: the boxes of the ground truth: `annotated`, or those of the `mask`.
        how: the options with which the backends were opened.
        skipped: the reason why a backend did not open, by name.
        truth: the ground truth.
        detections: the number of detections per image that count, if it is more than COCO's 100.
        labels: the data's label for each of the bundle's labels.
        tolerance: the AP points that a contestant may be off; None for the tolerance of its precision.
        trace: whether ONNX graphs are traced even if nothing failed; int8 graphs always are.
        altered_scales: sentences on scales of the int8 graphs that differ from the calibration's.
        draw: whether to draw pictures of the worst disagreements and of the worst errors.
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
        """Scores all contestants and compares them with the first.

        Args:
            predictors: the predictors by name.
            foreign: COCO results of other pipelines by name, for each image of `truth`.

        Returns:
            the report, and for each contestant pictures of the images that differ most; for the
            reference, of those with most errors.
        """
        (first, reference), *others = predictors.items()
        base = self._score(first, reference)
        # the others are scored on the images that the first could decode
        judge = _Judge(dataclasses.replace(self, truth=base.truth), first, reference, base)
        judge.check_graphs(first)
        for name, predictor in others:
            judge.add_backend(name, predictor)
        decoded = set(base.truth.indices)
        for name, results in foreign.items():
            images = zip(self.truth.indices, results, strict=True)
            judge.add_results(name, [rows for index, rows in images if index in decoded])
        errors = analyse(base.truth, base.results)
        if self.draw:
            judge.pictures[first] = worst_pictures(errors.tasks["segm"], base.truth, base.results)
        check = judge.checks.get(first, GraphCheck([], None))
        altered = [f"{first}: {sentence}" for sentence in check.causes + check.altered[:1]]
        report = ParityReport(
            bundle=str(self.bundle.folder),
            data=self.data,
            boxes=self.boxes,
            proposals=self.how.proposals,
            short_side=self.how.short_side,
            **self.how.views(),
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
            errors=errors,
            weights={name: check.altered for name, check in judge.checks.items()},
            traces={name: check.trace for name, check in judge.checks.items() if check.trace},
        )
        return report, judge.pictures

    def _score(self, name: str, predictor: Predictor) -> Scores:
        return score_backend(
            predictor, self.truth, self.labels, self.detections, f"evaluating {name}"
        )


class _Judge:
    """Compares contestants with the reference and collects the results.

    Args:
        evaluation: the evaluation, whose truth has only images that the reference could decode.
        first: the reference's name.
        reference: the predictor with which the others are compared.
        base: the reference's scores.

    Attributes:
        points: AP points of all contestants, the reference's first.
        verdicts: the verdict on each other contestant.
        pictures: the pictures of each other contestant.
        checks: the checks of ONNX Runtime backends' graphs, if they could be read.
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
        """Scores and judges a backend; one that computes NaN counts as detecting nothing."""
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
        """Scores and judges another pipeline's COCO results, given for each image of the truth."""
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
        """Compares the weights of ONNX graphs; also every layer if something failed or `trace` is set.

        int8 graphs are always traced: their results are far from the network's, so that no other
        comparison of tensors judges them.

        Args:
            name: the backend's name; nothing is done for backends without ONNX graphs.
            failing: whether something failed already.

        Returns:
            one sentence for each failure.
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
        """The network that graphs are compared with, even if the reference is another backend."""
        try:
            import onnx  # noqa: F401  # reads the graphs

            from comask.runtime.backends.pytorch import model_from_bundle
        except ImportError as error:
            raise BackendUnavailableError(
                f"comparing graphs layer by layer needs torch and onnx ({error}): "
                f"pip install 'comask[export]'"
            ) from error
        return model_from_bundle(self._bundle)

    def _trace(self, precision: str) -> Trace:
        """Traces the image in which the reference detects most."""
        config = self._bundle.manifest.preprocess
        if config.short_side > TRACED_SIDE:
            config = config.resized(TRACED_SIDE)
        image = prepare(self._source.image(self._busiest[0]), config)
        return trace_graphs(self._network, self._bundle, precision, image.canvas, image.size)

    def _scored(self, results: Results) -> Scores:
        """Scores existing results."""
        final = self._truth.score(flat(results), detections=self._evaluation.detections)
        return Scores(final=final, results=results, truth=self._truth)

    def _compare_ap(self, scores: Scores, kind: str) -> ApComparison:
        tolerance = self._evaluation.tolerance
        if tolerance is None:
            tolerance = ap_tolerance(self._bundle.manifest, kind)
        return compare_ap(scores.final, self._base.final, kind, tolerance)

    def _shared(self, results: Results) -> list[tuple[float, float]]:
        """Returns, for each image, what its detections share with the reference's; see `shared`."""
        return [shared(a, b) for a, b in zip(self._base.results, results, strict=True)]

    def _add(
        self,
        name: str,
        scores: Scores,
        ap: ApComparison,
        failures: list[str],
        shares: list[tuple[float, float]],
        **fields: Any,
    ) -> None:
        """Keeps one contestant's points and verdict, and draws the images where it differs most.

        Args:
            name: the contestant's name.
            scores: its scores.
            ap: the difference of its AP from the reference's.
            failures: all failures, including those of `ap`.
            shares: the result of `_shared`.
            fields: further fields of `Verdict`.
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
            **fields,
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
    """Returns a text with a few of the ids, written as in the file."""
    return ", ".join(
        json.dumps(id_) for id_ in sorted(set(ids), key=lambda i: (str(type(i)), i))[:5]
    )


def busiest(base: Scores) -> list[int]:
    """Returns the images' places, in descending order of the reference's detections in them.

    Images without detections show little.
    """
    return sorted(range(len(base.results)), key=lambda i: -len(base.results[i]))
