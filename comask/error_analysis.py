"""Finds what is wrong with a model: score thresholds, confused classes, kinds of error, worst images.

All figures hold for one IoU, 0.5, of masks or of boxes. Detections and objects match as in COCO's AP50,
so the figures are parts of that number; `comask.error_matching` states the rules. Numbers are fractions
in 0..1, or -1 where they are undefined, as in `comask.evaluate`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from comask.bundle import DEFAULT_THRESHOLD
from comask.error_matching import (
    FOREGROUND,
    KINDS,
    MISSED,
    Booleans,
    Floats,
    Integers,
    Matches,
    Results,
    ap50,
    by_class,
    interpolated_precision,
    match,
)
from comask.evaluate import TASKS, Truth

SCORES = np.arange(101) / 100  # the thresholds at which curves are read
WORST = 6  # number of images listed
ALL_CLASSES = "all classes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Four curves of 101 points each.

    Attributes:
        precision: the share of the detections of at least each score 0, 0.01, …, 1 that are right; -1
            where there is no detection.
        recall: the share of the objects that these detections find; -1 without objects.
        f1: the harmonic mean of the two, 2·right / (detections + objects); -1 without objects.
        interpolated: the highest precision at each recall 0, 0.01, …, 1 or above, of which AP50 is the
            mean; -1 without objects.
    """

    precision: list[float]
    recall: list[float]
    f1: list[float]
    interpolated: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAccuracy:
    """How well one class is detected.

    Attributes:
        name: the name of the class.
        objects: the number of its objects, without crowds.
        detections: the number of its detections of any score, without those in crowds.
        ap50: the AP at IoU 0.5; -1 without objects.
        threshold: the score from which detections give the largest F1; of several, the highest. It is
            `DEFAULT_THRESHOLD` if the class has no objects, or if no detection is right.
        fitted: whether `threshold` is the class's own, not the default.
        precision: the precision at `threshold`.
        recall: the recall at `threshold`.
        f1: the F1 at `threshold`.
        curve: the same for other thresholds.
    """

    name: str
    objects: int
    detections: int
    ap50: float
    threshold: float
    fitted: bool
    precision: float
    recall: float
    f1: float
    curve: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorKind:
    """One kind of error.

    Attributes:
        count: the number of errors among all detections, or of missed objects.
        at_thresholds: the number among the detections of at least their classes' thresholds.
        gain: the AP50 that fixing all of them would add; -1 if either AP50 is undefined.
    """

    count: int
    at_thresholds: int
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageErrors:
    """The errors in one image at the classes' thresholds.

    Attributes:
        place: the image's place among those of the truth.
        file: the image's file name, or its id if it has none.
        kinds: the number of errors of each kind.
        wrong: the wrong detections, by their places among the results of the image.
        not_found: the objects that no detection matches, by their places among the annotations of the
            image. Those that a detection of another class or place covers are not errors of their own.
    """

    place: int
    file: str
    kinds: dict[str, int]
    wrong: list[int]
    not_found: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskErrors:
    """What is wrong with masks, or with boxes.

    Attributes:
        ap50: the AP50 of `comask.evaluate`.
        overall: all classes together, with one threshold; AP50 and `interpolated` are means over the
            classes.
        classes: the classes in label order.
        confusion: `confusion[truth][predicted]` counts objects and detections at the classes' thresholds;
            the last row and column stand for the background. A detection that matches no object of its
            class takes the free object of another class that it overlaps most, by at least IoU 0.5.
        kinds: the kinds of error of TIDE.
        worst: the images with most errors at the classes' thresholds, the worst first.
    """

    ap50: float
    overall: ClassAccuracy
    classes: list[ClassAccuracy]
    confusion: list[list[int]]
    kinds: dict[str, ErrorKind]
    worst: list[ImageErrors]

    @property
    def thresholds(self) -> dict[str, float]:
        """The threshold of each class that has its own, by name."""
        return {c.name: c.threshold for c in self.classes if c.fitted}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnalysis:
    """What is wrong with a model.

    Attributes:
        images: the number of images.
        iou: the IoU from which a detection is right.
        tasks: the figures for masks (`segm`) and for boxes (`bbox`).
    """

    images: int
    iou: float = FOREGROUND
    tasks: dict[str, TaskErrors]


def analyse(truth: Truth, results: Results) -> ErrorAnalysis:
    """Analyses the errors of detections.

    Args:
        truth: the ground truth.
        results: COCO results of each image of `truth.indices`, with the data's category ids; results of
            unknown categories are ignored.

    Raises:
        ValueError: when the number of images is not that of `truth`.
    """
    tasks = {task: _errors(truth, match(truth, results, task)) for task in TASKS}
    return ErrorAnalysis(images=len(truth.indices), tasks=tasks)


def _errors(truth: Truth, matches: Matches) -> TaskErrors:
    names = [category.name for category in truth.source.categories]
    objects = np.bincount(matches.object_labels, minlength=len(names)).tolist()
    right = matches.found >= 0
    classes = [
        _accuracy(name, matches.scores[places], right[places], count)
        for name, places, count in zip(
            names, by_class(matches.labels, len(names)), objects, strict=True
        )
    ]
    thresholds = np.array([c.threshold for c in classes])
    kept = matches.scores >= thresholds[matches.labels]
    return TaskErrors(
        ap50=ap50(matches, len(names)),
        overall=_overall(matches, classes),
        classes=classes,
        confusion=_confusion(matches, kept, len(names)),
        kinds=_kinds(matches, kept, len(names)),
        worst=_worst(truth, matches, kept),
    )


def _accuracy(name: str, scores: Floats, right: Booleans, objects: int) -> ClassAccuracy:
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    hits = np.concatenate(([0], np.cumsum(right)))  # by the number of detections

    def at(counts: Integers) -> tuple[Floats, Floats, Floats]:
        """Precision, recall and F1 of the best `counts` detections."""
        found, undefined = hits[counts], np.full(len(counts), -1.0)
        precision = np.divide(found, counts, out=undefined.copy(), where=counts > 0)
        if not objects:
            return precision, undefined, undefined
        return precision, found / objects, 2 * found / (counts + objects)

    ends = np.flatnonzero(np.diff(scores, append=-np.inf)) + 1  # after detections of equal scores
    fitted = bool(objects and hits[-1])
    threshold = float(scores[ends[at(ends)[2].argmax()] - 1]) if fitted else DEFAULT_THRESHOLD
    interpolated = interpolated_precision(scores, right, objects) if objects else np.full(101, -1.0)
    precision, recall, f1 = at(_at_least(scores, np.array([threshold])))
    curves = at(_at_least(scores, SCORES))
    return ClassAccuracy(
        name=name,
        objects=objects,
        detections=len(scores),
        ap50=float(interpolated.mean()),
        threshold=threshold,
        fitted=fitted,
        precision=float(precision[0]),
        recall=float(recall[0]),
        f1=float(f1[0]),
        curve=Curve(
            **{
                curve: values.tolist()
                for curve, values in zip(("precision", "recall", "f1"), curves, strict=True)
            },
            interpolated=interpolated.tolist(),
        ),
    )


def _at_least(scores: Floats, thresholds: Floats) -> Integers:
    """Returns, for each threshold, how many of the falling `scores` are at least that."""
    return len(scores) - np.searchsorted(scores[::-1], thresholds)


def _overall(matches: Matches, classes: list[ClassAccuracy]) -> ClassAccuracy:
    """Returns the figures of all detections and objects, with AP and its curve as COCO averages them."""
    objects = sum(c.objects for c in classes)
    pooled = _accuracy(ALL_CLASSES, matches.scores, matches.found >= 0, objects)
    curves = [c.curve.interpolated for c in classes if c.objects]
    if not curves:
        return pooled
    mean = np.mean(curves, axis=0)
    curve = dataclasses.replace(pooled.curve, interpolated=mean.tolist())
    return dataclasses.replace(pooled, ap50=float(mean.mean()), curve=curve)


def _confusion(matches: Matches, kept: Booleans, classes: int) -> list[list[int]]:
    """Counts pairs of object and detection, and those without a partner as pairs with the background."""
    partner = np.where(kept, matches.found, -1)
    free = ~matches.found_by(kept)
    for detection, thing in matches.overlaps.tolist():
        if kept[detection] and partner[detection] < 0 and free[thing]:
            partner[detection], free[thing] = thing, False
    paired, alone = kept & (partner >= 0), kept & (partner < 0)
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(matrix, (matches.object_labels[partner[paired]], matches.labels[paired]), 1)
    np.add.at(matrix[-1], matches.labels[alone], 1)
    np.add.at(matrix[:, -1], matches.object_labels[free], 1)
    counts: list[list[int]] = matrix.tolist()
    return counts


def _kinds(matches: Matches, kept: Booleans, classes: int) -> dict[str, ErrorKind]:
    every = np.ones_like(kept)
    total, shown = (_count(matches, chosen).sum(axis=0).tolist() for chosen in (every, kept))
    before = ap50(matches, classes)
    kinds = {}
    for kind, name in enumerate(KINDS):
        fixed = ap50(matches, classes, fixed=kind)
        gain = fixed - before if min(fixed, before) >= 0 else -1.0
        kinds[name] = ErrorKind(count=total[kind], at_thresholds=shown[kind], gain=gain)
    return kinds


def _count(matches: Matches, kept: Booleans) -> Integers:
    """Returns [images, kinds], the errors of the detections `kept` and the objects that they miss."""
    images = 1 + max(matches.images.max(initial=-1), matches.object_images.max(initial=-1))
    counts = np.zeros((images, len(KINDS)), np.int64)
    wrong = kept & (matches.kinds >= 0)
    np.add.at(counts, (matches.images[wrong], matches.kinds[wrong]), 1)
    np.add.at(counts[:, MISSED], matches.object_images[matches.missed_by(kept)], 1)
    return counts


def _worst(truth: Truth, matches: Matches, kept: Booleans) -> list[ImageErrors]:
    counts = _count(matches, kept)
    errors, wrong, lost = counts.sum(axis=1), kept & (matches.kinds >= 0), ~matches.found_by(kept)
    worst = []
    for image in np.argsort(-errors, kind="stable")[:WORST].tolist():
        if not errors[image]:
            break
        info = truth.source.info(truth.indices[image])
        worst.append(
            ImageErrors(
                place=image,
                file=info.file_name or str(info.id),
                kinds=dict(zip(KINDS, counts[image].tolist(), strict=True)),
                wrong=sorted(matches.places[wrong & (matches.images == image)].tolist()),
                not_found=matches.object_places[lost & (matches.object_images == image)].tolist(),
            )
        )
    return worst
