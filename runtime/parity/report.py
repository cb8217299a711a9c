"""The report of `comask eval`: its numbers, as JSON and as a self-contained HTML page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comask.data.source import InstanceSource, not_decoded_text
from comask.error_analysis import ErrorAnalysis
from comask.error_pictures import Picture, Side, draw_pair
from comask.error_section import error_section
from comask.evaluate import COCO_DETECTIONS, METRICS, TASK_NAMES, TASKS, CocoMetrics
from comask.page import render
from comask.runtime.bench.machine import Machine
from comask.runtime.parity.layers import Trace
from comask.runtime.parity.open_backends import precision_of
from comask.runtime.parity.scores import Scores
from comask.runtime.parity.verdict import Entries, Verdict, pairs
from comask.runtime.tolerances import TOLERANCES

TEMPLATE = Path(__file__).with_name("report.html.jinja")

SAME = 0.999  # images with at least this agreement are not worth a picture
# detections from score SHOWN on are drawn; if there are none, the AT_LEAST best ones
SHOWN, AT_LEAST = 0.3, 3


@dataclass(frozen=True, kw_only=True)
class Points:
    """AP in points (0..100); -1 if the data has no such objects.

    Attributes:
        bbox: COCO's twelve numbers for boxes.
        segm: COCO's twelve numbers for masks.
        detections: the number of detections.
        per_class: `per_class[task][class name]`, AP as a fraction.
        max_detections: the number of detections per image that count.
        coco_ap: AP by task of COCO's 100 detections per image; empty if `max_detections` is 100.
    """

    bbox: dict[str, float]
    segm: dict[str, float]
    detections: int
    per_class: dict[str, dict[str, float]]
    max_detections: int
    coco_ap: dict[str, float]

    @property
    def tasks(self) -> dict[str, dict[str, float]]:
        """The numbers by task."""
        return {"bbox": self.bbox, "segm": self.segm}


@dataclass(frozen=True, kw_only=True)
class BackendPoints(Points):
    """The points of a contestant.

    Attributes:
        first: the points of proposals and coarse masks; None if the backend does not return them.
        plain: the points of boxes for which all cells count alike; None if the backend does not return
            them.
    """

    first: Points | None
    plain: Points | None


def points_of(scores: Scores) -> BackendPoints:
    """Returns the scores of one contestant in points."""
    first, plain = (Points(**_points(m)) if m else None for m in (scores.first, scores.plain))
    return BackendPoints(**_points(scores.final), first=first, plain=plain)


def _points(metrics: CocoMetrics) -> dict[str, Any]:
    """Returns the fields of `Points`."""

    def scaled(numbers: Mapping[str, float]) -> dict[str, float]:
        return {key: 100 * value if value >= 0 else -1.0 for key, value in numbers.items()}

    return {
        **{task: scaled(numbers) for task, numbers in metrics.values.items()},
        "detections": metrics.detections,
        "per_class": metrics.per_class,
        "max_detections": metrics.max_detections,
        "coco_ap": scaled(metrics.coco_ap or {}),
    }


def change_text(value: float, delta: float) -> str:
    """Returns a contestant's difference in points; `n/a` if its `value` is."""
    return f"{delta:+.3f}" if value >= 0 else "n/a"


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The inputs and the results of a comparison.

    Attributes:
        bundle: the bundle's folder.
        data: the value of `--data`.
        boxes: the value of `--boxes`.
        proposals: the number of proposals that stage 2 took; None for all of the bundle's.
        short_side: shorter side of the resized images in pixels; None for the bundle's.
        tile: side of the tiles in pixels of the image; None for whole images.
        tile_overlap: the share of a tile that the next one has, too; None without tiles.
        tta: the augmented views, as in `flip,scale`; None for none.
        when: date and time in UTC, ISO 8601.
        machine: the machine on which it was measured.
        skipped: the reason why a backend did not run, by name.
        verification: the verification in the bundle's manifest.
        failures: failures that concern the bundle or the reference, not one contestant.
        reference: the name of the first backend.
        images: the number of images that were scored.
        not_decoded: the number of images that could not be decoded.
        max_detections: the number of detections per image that count.
        backends: the points of each backend by name, the reference's first.
        comparisons: the verdict on each other contestant, by name.
        errors: what is wrong with the reference's detections.
        weights: for each backend, one sentence per tensor of its graphs that differs from the network's.
        traces: the comparison layer by layer, by backend.
    """

    bundle: str
    data: str
    boxes: str
    proposals: int | None
    short_side: int | None
    tile: int | None
    tile_overlap: float | None
    tta: str | None
    when: str
    machine: Machine
    skipped: dict[str, str]
    verification: Mapping[str, Any]
    failures: list[str]
    reference: str
    images: int
    not_decoded: int
    max_detections: int
    backends: dict[str, BackendPoints]
    comparisons: dict[str, Verdict]
    errors: ErrorAnalysis
    weights: dict[str, list[str]]
    traces: dict[str, Trace]

    @property
    def failed(self) -> bool:
        """Whether anything failed, even if too little was detected to judge the rest."""
        return bool(self.failures) or not all(v.passed for v in self.comparisons.values())

    @property
    def not_judged(self) -> str:
        """The reason why a comparison without failures proves nothing; empty if it proves something."""
        reference = self.backends[self.reference]
        if reference.segm["AP"] < 0:
            return "the data has no objects, so AP is undefined: give images with annotated objects"
        if not reference.detections:
            return (
                "the reference found nothing in these images: train longer, or export again with a "
                "lower --score-threshold"
            )
        return "" if self.comparisons else "nothing to compare it with; name another --backend"

    @property
    def passed(self) -> bool:
        """Whether something was judged and nothing failed."""
        return not (self.failed or self.not_judged)

    def without(self, name: str) -> ParityReport:
        """Returns the report without one contestant."""
        return dataclasses.replace(
            self,
            backends={key: value for key, value in self.backends.items() if key != name},
            comparisons={key: value for key, value in self.comparisons.items() if key != name},
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `--json`; comparisons that a contestant does not have are left out."""
        content = dataclasses.asdict(self)
        content["comparisons"] = {
            name: {key: value for key, value in verdict.items() if value is not None}
            for name, verdict in content["comparisons"].items()
        }
        return content | {"not_judged": self.not_judged, "passed": self.passed}


def parity_page(report: ParityReport, pictures: Mapping[str, Sequence[Picture]]) -> bytes:
    """Returns a report as an HTML page.

    Args:
        report: the report to show.
        pictures: for each contestant, pictures of the images that differ most; for the reference, of
            those with most errors.
    """
    when = report.when.replace("T", " ").removesuffix("+00:00") + " UTC"
    facts = [
        ("data", f"{report.data}, {report.images} images"),
        ("left out", report.not_decoded and not_decoded_text(report.not_decoded, report.images)),
        ("detections", f"the {report.max_detections} best per image count"),
        ("reference", report.reference),
        ("proposals", report.proposals),
        ("short side", report.short_side),
        ("tiles", report.tile and f"{report.tile} pixels, overlapping by {report.tile_overlap:g}"),
        ("augmented views", report.tta),
        ("measured", when),
    ]
    return render(
        TEMPLATE,
        title=f"Parity of {report.bundle}",
        report=report,
        pictures=pictures,
        errors=error_section(report.errors, pictures.get(report.reference, [])),
        facts_of_report=[(name, value) for name, value in facts if value],
        staged={name: v.stages for name, v in report.comparisons.items() if v.stages},
        limits={
            name: TOLERANCES[precision].relative
            for name in report.comparisons
            if (precision := precision_of(name)) in TOLERANCES
        },
        classes={
            task: sorted({c for points in report.backends.values() for c in points.per_class[task]})
            for task in TASKS
        },
        change=change_text,
        coco_detections=COCO_DETECTIONS,
        metrics=METRICS,
        names={task: TASK_NAMES[task] for task in TASKS},
    )


def side_by_side(
    source: InstanceSource,
    index: int,
    reference: tuple[str, Entries],
    other: tuple[str, Entries],
    value: float,
) -> Picture:
    """Draws the reference's detections on the left and the other's on the right.

    Detections without a partner on the other side are framed.

    Args:
        source: the data set.
        index: the image's index.
        reference: the reference's name, and its COCO results on the image.
        other: the other contestant's name, and its COCO results on the image.
        value: their agreement.
    """
    info, categories = source.info(index), source.categories
    known = {category.id for category in categories}
    shown = [
        _shown([entry for entry in entries if entry["category_id"] in known])
        for _, entries in (reference, other)
    ]
    everything = reference[1], other[1]
    lone = [
        [entry for i, entry in enumerate(mine) if i not in matched]
        for mine, matched in (
            (shown[0], {i for i, _, _ in pairs(shown[0], everything[1])}),
            (shown[1], {j for _, j, _ in pairs(everything[0], shown[1])}),
        )
    ]
    sides = [Side(*entries, categories) for entries in zip(shown, lone, strict=True)]
    content = draw_pair(source.image(index), info, *sides)
    caption = (
        f"{info.file_name or info.id}: agreement {value:.3f}; left: {reference[0]}, {len(shown[0])} "
        f"detections, {len(lone[0])} framed because {other[0]} lacks them; right: {other[0]}, "
        f"{len(shown[1])} detections, {len(lone[1])} framed"
    )
    return Picture(caption, content)


def _shown(entries: Entries) -> Entries:
    ranked = sorted(entries, key=lambda entry: -entry["score"])
    return [entry for entry in ranked if entry["score"] >= SHOWN] or ranked[:AT_LEAST]
