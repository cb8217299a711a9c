"""All contestants against the first of them: AP, stages, layers, images that differ most."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Bundle
from comask.data.source import Id
from comask.errors import BackendUnavailableError, NotFiniteError
from comask.evaluate import Truth
from comask.preprocess import prepare
from comask.runtime.parity.contestants import looser, precision_of
from comask.runtime.parity.foreign import explain_results
from comask.runtime.parity.judge import (
    LEAST_AGREEMENT,
    agreement,
    ap_tolerance,
    compare_ap,
    points,
    shared,
)
from comask.runtime.parity.layers import altered_weights, trace_graphs
from comask.runtime.parity.pictures import SAME, WORST, side_by_side
from comask.runtime.parity.scores import Results, Scores, flat, score_backend
from comask.runtime.parity.stages import IMAGES, compare_backends
from comask.runtime.predictor import Predictor

if TYPE_CHECKING:
    from comask.models.comask import CoMask

TRACED_SIDE = 320  # pixels of a traced image's shorter side at most: all layers' outputs are kept

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is compared on what.

    Attributes:
        bundle: of all backends.
        truth: of the images.
        detections: of an image that count, where they are more than COCO's 100.
        labels: the data's label of each of the bundle's.
        tolerance: AP points for every contestant; None: by precision.
        trace: whether ONNX graphs are traced though nothing failed; int8 ones are in any case.
        altered_scales: what of the int8 graphs' scales is not the calibration's.
        draw: whether pictures of the worst disagreements are made.
    """

    bundle: Bundle
    truth: Truth
    detections: int
    labels: NDArray[np.int64]
    tolerance: float | None
    trace: bool
    altered_scales: Sequence[str]
    draw: bool

    def run(
        self, predictors: Mapping[str, Predictor], foreign: Mapping[str, Results]
    ) -> tuple[dict[str, Any], dict[str, list[tuple[str, bytes]]]]:
        """Scores all and compares them with the first.

        Args:
            predictors: by name.
            foreign: COCO results of other pipelines by name, of each image of `truth`.

        Returns:
            the report, and by contestant captions and JPEGs of the images that differ most.
        """
        (first, reference), *others = predictors.items()
        base = self._score(first, reference)
        # the others are scored on what the first could decode
        scored = dataclasses.replace(self, truth=base.truth)
        decoded = set(base.truth.indices)
        foreign = {
            name: [
                rows for i, rows in zip(self.truth.indices, results, strict=True) if i in decoded
            ]
            for name, results in foreign.items()
        }
        not_decoded = len(self.truth.indices) - len(decoded)
        return scored._run(first, reference, base, others, foreign, not_decoded)

    def _run(
        self,
        first: str,
        reference: Predictor,
        base: Scores,
        others: Sequence[tuple[str, Predictor]],
        foreign: Mapping[str, Results],
        not_decoded: int,
    ) -> tuple[dict[str, Any], dict[str, list[tuple[str, bytes]]]]:
        report: dict[str, Any] = {
            "reference": first,
            "images": base.final.images,
            "not_decoded": not_decoded,
            "max_detections": base.final.max_detections,
            "backends": {first: _numbers(base)},
            "comparisons": {},
            "weights": {},
            "traces": {},
        }
        pictures: dict[str, list[tuple[str, bytes]]] = {}
        if first.startswith("onnxruntime"):
            self._check_graphs(first, base, [], report)
        for name, predictor in others:
            scores, found = self._judge(name, predictor, base, reference)
            if name.startswith("onnxruntime"):
                self._check_graphs(name, base, found["failures"], report)
            self._add(name, scores, found, base, report, pictures)
        for name, results in foreign.items():
            scores = self._scored(results)
            found = self._compare_foreign(scores, base, reference)
            self._add(name, scores, found, base, report, pictures)
        return report, pictures

    def _add(
        self,
        name: str,
        scores: Scores,
        found: dict[str, Any],
        base: Scores,
        report: dict[str, Any],
        pictures: dict[str, list[tuple[str, bytes]]],
    ) -> None:
        """Puts one contestant into the report, with its verdict."""
        if base.final.detections and not scores.final.detections:
            found["failures"].append("no detections at all, so nothing was compared")
        report["backends"][name] = _numbers(scores)
        report["comparisons"][name] = found | {"passed": not found["failures"]}
        pictures[name] = self._worst(name, report["reference"], found, base.results, scores.results)

    def _score(self, name: str, predictor: Predictor) -> Scores:
        return score_backend(
            predictor, self.truth, self.labels, self.detections, f"evaluating {name}"
        )

    def _scored(self, results: Results) -> Scores:
        """The worth of results that are there."""
        final = self.truth.score(flat(results), detections=self.detections)
        return Scores(final=final, results=results, truth=self.truth)

    def _judge(
        self, name: str, predictor: Predictor, base: Scores, reference: Predictor
    ) -> tuple[Scores, dict[str, Any]]:
        """One backend's scores and comparison; what computes NaN counts as finding nothing."""
        try:
            scores = self._score(name, predictor)
            return scores, self._compare(name, scores, base, reference, predictor)
        except NotFiniteError as error:
            scores = self._scored([[] for _ in self.truth.indices])
            precision = precision_of(name)
            found = compare_ap(scores.final, base.final, precision, self._tolerance(precision))
            found["failures"].insert(0, str(error))
            return scores, found | self._agreement(base.results, scores.results)

    def _compare(
        self, name: str, scores: Scores, base: Scores, reference: Predictor, predictor: Predictor
    ) -> dict[str, Any]:
        precision = looser(precision_of(name), precision_of(reference.stages.backend))
        found = compare_ap(scores.final, base.final, precision, self._tolerance(precision))
        places = busiest(base)[:IMAGES]
        images = [reference.prepare(self.truth.source.image(self.truth.indices[i])) for i in places]
        stages = compare_backends(
            reference.stages, predictor.stages, images, self.bundle.manifest.model, precision
        )
        found["stages"] = stages
        if stages["failures"]:
            rest = stages["beyond"] - 1
            found["failures"].append(
                f"stage by stage, first: {stages['failures'][0]}"
                + (f" (and {rest} more)" if rest else "")
            )
        return found | self._agreement(base.results, scores.results)

    def _compare_foreign(
        self, scores: Scores, base: Scores, reference: Predictor
    ) -> dict[str, Any]:
        found = compare_ap(scores.final, base.final, "results", self._tolerance("results"))
        found |= self._agreement(base.results, scores.results)
        if found["agreement"] < LEAST_AGREEMENT:
            found["failures"].append(
                f"its detections agree with the reference's by {found['agreement']:.3f}, at least "
                f"{LEAST_AGREEMENT} is expected (1: the same)"
            )
        known = {category.id for category in self.truth.source.categories}
        ids = [row["category_id"] for rows in scores.results for row in rows]
        if unknown := [number for number in ids if number not in known]:
            found["failures"].append(
                f"{len(unknown)} of {len(ids)} results have a category_id that the data lack "
                f"({_some(unknown)}; they have {_some(known)})"
            )
        if found["failures"] and ids:
            cause, found["mistakes"] = explain_results(
                scores.results, reference, self.truth.source, self.truth.indices, self.labels
            )
            if cause:
                found["failures"].insert(0, cause)
        return found

    def _tolerance(self, kind: str) -> float:
        return (
            ap_tolerance(self.bundle.manifest, kind) if self.tolerance is None else self.tolerance
        )

    def _agreement(self, base: Results, other: Results) -> dict[str, Any]:
        """Over all images, and the images where it is least."""
        sums = [shared(a, b) for a, b in zip(base, other, strict=True)]
        values = [agreement([pair]) for pair in sums]
        order = np.argsort(values, kind="stable")[:WORST].tolist()
        return {
            "agreement": agreement(sums),
            "worst_images": [
                {
                    "place": i,
                    "file": self.truth.source.info(self.truth.indices[i]).file_name,
                    "agreement": values[i],
                }
                for i in order
            ],
        }  # fmt: skip

    def _worst(
        self, name: str, first: str, found: Mapping[str, Any], base: Results, other: Results
    ) -> list[tuple[str, bytes]]:
        if not self.draw:
            return []
        return [
            side_by_side(
                self.truth.source, self.truth.indices[entry["place"]], (first, base[entry["place"]]),
                (name, other[entry["place"]]), entry["agreement"],
            )
            for entry in found["worst_images"]
            if entry["agreement"] < SAME
        ]  # fmt: skip

    @cached_property
    def _network(self) -> CoMask:
        """What graphs are compared with, whatever the reference is."""
        try:
            import onnx  # noqa: F401  # reads the graphs

            from comask.runtime.torch_session import model_from_bundle
        except ImportError as error:
            raise BackendUnavailableError(
                f"looking into graphs needs torch and onnx ({error}): pip install 'comask[export]'"
            ) from error
        return model_from_bundle(self.bundle)

    def _check_graphs(
        self, name: str, base: Scores, failures: list[str], report: dict[str, Any]
    ) -> None:
        """Compares the graphs' weights, and where something fails (or by wish) every layer.

        int8 graphs are traced in any case: far from the network as they are, no other comparison of
        tensors judges them.

        Args:
            name: of the ONNX Runtime backend.
            base: of the reference.
            failures: of the backend; takes more.
            report: takes `weights` and `traces`.
        """
        precision = precision_of(name)
        try:
            network = self._network
        except BackendUnavailableError as error:
            if self.trace:
                raise
            logger.warning("%s: weights are not compared: %s", name, error)
            return
        altered = altered_weights(network, self.bundle, precision)
        if precision == "int8":
            altered += self.altered_scales
        report["weights"][name] = altered
        if altered:
            rest = f" (and {len(altered) - 1} more)" if len(altered) > 1 else ""
            failures.insert(0, f"{altered[0]}{rest}")
        if failures or self.trace or precision == "int8":
            report["traces"][name] = trace = self._trace(precision, base)
            if trace["first"]:
                failures.insert(0, trace["cause"])

    def _trace(self, precision: str, base: Scores) -> dict[str, Any]:
        """A `Trace` of the busiest image as a dictionary."""
        config = self.bundle.manifest.preprocess
        if config.short_side > TRACED_SIDE:
            config = config.resized(TRACED_SIDE)
        image = prepare(self.truth.source.image(self.truth.indices[busiest(base)[0]]), config)
        trace = trace_graphs(self._network, self.bundle, precision, image.canvas, image.size)
        values = dataclasses.asdict(trace)
        for entry, difference in zip(values["differences"], trace.differences, strict=True):
            entry["tensor"] = difference.tensor
        if trace.first:
            values["first"]["tensor"] = trace.first.tensor
        return values


def _some(ids: Iterable[Id]) -> str:
    """A few ids, as the file has them."""
    return ", ".join(
        json.dumps(id_) for id_ in sorted(set(ids), key=lambda i: (str(type(i)), i))[:5]
    )


def busiest(base: Scores) -> list[int]:
    """Places of the images, those first in which the reference finds most: empty ones show little."""
    return sorted(range(len(base.results)), key=lambda i: -len(base.results[i]))


def _numbers(scores: Scores) -> dict[str, Any]:
    before = {"first": scores.first, "plain": scores.plain}
    return {
        **points(scores.final),
        **{stage: points(metrics) if metrics else None for stage, metrics in before.items()},
    }
