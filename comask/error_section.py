"""Arranges an error analysis for pages; `error_section.html.jinja` shows it.

The figures are those of masks; boxes appear beside them where there is room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comask.bundle import DEFAULT_THRESHOLD
from comask.error_analysis import ClassAccuracy, ErrorAnalysis, ErrorKind, TaskErrors
from comask.error_pictures import Picture

SHOWN = 15  # classes in the table of confusions; of more, those that are confused most
PAIRS = 10  # pairs of classes listed
BACKGROUND, OTHERS = "background", "other classes"
KIND_TEXTS = {
    "classification": "it fits an object of another class",
    "localization": "its class is right, but it overlaps the object too little (IoU 0.1 to 0.5)",
    "both": "it overlaps an object of another class, and too little",
    "duplicate": "another detection of a higher score has found the object",
    "background": "it overlaps no object (IoU at most 0.1)",
    "missed": "an object that no detection finds, nor means with a wrong class or place",
}


@dataclass(frozen=True, slots=True)
class Confusion:
    """A table of objects and detections.

    Attributes:
        heads: the heads of the columns: classes, `OTHERS` if some are left out, and `BACKGROUND`.
        rows: a class or `BACKGROUND`, and for each column a count and its share in 0..1 of the row.
        left_out: the number of classes that are not shown.
    """

    heads: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]
    left_out: int


@dataclass(frozen=True, slots=True)
class Charts:
    """The charts of one class, or of all together.

    Attributes:
        accuracy: the figures.
        paths: by the names of `Curve`, the `d` of an SVG path; x and y are percent.
    """

    accuracy: ClassAccuracy
    paths: dict[str, str]


@dataclass(frozen=True, slots=True)
class ErrorSection:
    """What a page shows of an analysis.

    Attributes:
        analysis: the analysis.
        masks: the figures for masks.
        kinds: for each kind of error its name, its explanation, and its figures for masks and for boxes.
        largest: the largest gain of AP50 by fixing a kind of error, of masks.
        confusion: the confusion of classes, of masks.
        confused: the most frequent confusions: the class, what it was taken for, and how often.
        classes: the figures of each class for masks and for boxes, the lowest AP50 first; classes without
            objects come last.
        overall: the charts of all classes together, of masks.
        charts: the charts of each class with objects, of masks, the lowest AP50 first.
        pictures: the images with most errors.
    """

    analysis: ErrorAnalysis
    masks: TaskErrors
    kinds: list[tuple[str, str, ErrorKind, ErrorKind]]
    largest: float
    confusion: Confusion
    confused: list[tuple[str, str, int]]
    classes: list[tuple[ClassAccuracy, ClassAccuracy]]
    overall: Charts
    charts: list[Charts]
    pictures: Sequence[Picture]
    default_threshold: float = DEFAULT_THRESHOLD


def error_section(analysis: ErrorAnalysis, pictures: Sequence[Picture]) -> ErrorSection:
    """Arranges an analysis for a page.

    Args:
        analysis: the analysis.
        pictures: the result of `worst_pictures`.
    """
    masks, boxes = analysis.tasks["segm"], analysis.tasks["bbox"]
    names = [found.name for found in masks.classes]
    matrix = np.array(masks.confusion)
    classes = sorted(
        zip(masks.classes, boxes.classes, strict=True),
        key=lambda pair: (not pair[0].objects, pair[0].ap50),
    )
    return ErrorSection(
        analysis=analysis,
        masks=masks,
        kinds=[
            (name, KIND_TEXTS[name], kind, boxes.kinds[name]) for name, kind in masks.kinds.items()
        ],
        largest=max(kind.gain for kind in masks.kinds.values()),
        confusion=_confusion(names, matrix),
        confused=_confused(names, matrix),
        classes=classes,
        overall=_charts(masks.overall),
        charts=[_charts(mask) for mask, _ in classes if mask.objects],
        pictures=pictures,
    )


def _confusion(names: list[str], matrix: np.ndarray) -> Confusion:
    """Returns the table of all classes, or of the `SHOWN` ones that are confused with others most."""
    between = matrix[:-1, :-1] * (1 - np.eye(len(names), dtype=int))
    involved = between.sum(axis=0) + between.sum(axis=1)
    chosen = sorted(np.argsort(-involved, kind="stable")[:SHOWN].tolist())
    left_out = len(names) - len(chosen)
    heads = [names[label] for label in chosen]
    rows = []
    for name, counts in zip([*heads, BACKGROUND], matrix[[*chosen, -1]], strict=True):
        cells = counts[chosen].tolist()
        cells += [int(counts[:-1].sum()) - sum(cells)] * bool(left_out) + [int(counts[-1])]
        total = max(1, sum(cells))
        rows.append((name, [(count, count / total) for count in cells]))
    return Confusion([*heads, *[OTHERS] * bool(left_out), BACKGROUND], rows, left_out)


def _confused(names: list[str], matrix: np.ndarray) -> list[tuple[str, str, int]]:
    pairs = [
        (int(matrix[truth, predicted]), truth, predicted)
        for truth, predicted in np.argwhere(matrix[:-1, :-1]).tolist()
        if truth != predicted
    ]
    pairs.sort(key=lambda pair: (-pair[0], *pair[1:]))
    return [(names[truth], names[predicted], count) for count, truth, predicted in pairs[:PAIRS]]


def _charts(accuracy: ClassAccuracy) -> Charts:
    curves = dataclasses.asdict(accuracy.curve)
    return Charts(accuracy, {name: _path(values) for name, values in curves.items()})


def _path(values: Sequence[float]) -> str:
    """Returns the path of 101 values in 0..1 over 0..100, in percent; values of -1 leave gaps."""
    path, pen = "", "M"
    for x, value in enumerate(values):
        if value < 0:
            pen = "M"
            continue
        path += f"{pen}{x} {100 * value:.4g}"
        pen = "L"
    return path
