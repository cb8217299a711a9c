"""Matches detections with objects as COCO does at one IoU, and sorts the wrong ones by kind of error.

The kinds are those of TIDE (Bolya et al., ECCV 2020, https://arxiv.org/abs/2008.08115, section 2.2).
Where a detection fits several, its first in this order counts, as in TIDE's program: localization,
classification, duplicate. Crowds follow COCO's rules: a detection that matches no object and lies in a
crowd of its class is neither right nor wrong. All of an image's detections count, as in
`comask.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.evaluate import Truth

FOREGROUND, BACKGROUND = 0.5, 0.1  # the IoU of a right detection, and of one beside no object
KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALIZATION, BOTH, DUPLICATE, NO_OBJECT, MISSED = range(len(KINDS))
RECALLS = np.linspace(0, 1, 101)  # at which COCO reads the precision
_FIELDS = {"segm": "segmentation", "bbox": "bbox"}

Results = Sequence[Sequence[Mapping[str, Any]]]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Matches:
    """The D detections and O objects of some images, without crowds and the detections in them.

    Attributes:
        scores: [D] f64, in 0..1; by image, and by falling score within an image.
        labels: [D] i64, classes counted from 0.
        images: [D] i64, the image's place among those of the truth.
        places: [D] i64, the detection's place among the results of its image.
        found: [D] i64, the object that the detection matches; -1 if it is wrong.
        kinds: [D] i64, the kind of error, an index of `KINDS`; -1 if the detection is right.
        meant: [D] i64, the object that the detection would match if its class (its place) were right, for
            an error of classification (of localization); -1 for other detections.
        object_labels: [O] i64, classes counted from 0.
        object_images: [O] i64, the image's place among those of the truth.
        object_places: [O] i64, the object's place among the annotations of its image.
        overlaps: [R, 2] i64, each detection and object of different classes with at least the IoU
            `FOREGROUND`; by detection, and by falling IoU for one detection.
    """

    scores: Floats
    labels: Integers
    images: Integers
    places: Integers
    found: Integers
    kinds: Integers
    meant: Integers
    object_labels: Integers
    object_images: Integers
    object_places: Integers
    overlaps: Integers

    def found_by(self, kept: Booleans) -> Booleans:
        """Returns [O], whether any of the detections `kept` ([D]) matches an object.

        COCO matches by falling score, so detections below a threshold change no match above it.
        """
        return self._named(self.found[kept])

    def missed_by(self, kept: Booleans) -> Booleans:
        """Returns [O], whether none of the detections `kept` ([D]) matches or means an object."""
        return ~(self.found_by(kept) | self._named(self.meant[kept]))

    def _named(self, objects: Integers) -> Booleans:
        """Returns [O], whether an object is among `objects`, of which -1 names none."""
        named = np.zeros(len(self.object_labels), np.bool_)
        named[objects[objects >= 0]] = True
        return named


def match(truth: Truth, results: Results, task: str) -> Matches:
    """Matches the detections of all images.

    Args:
        truth: the ground truth.
        results: COCO results of each image of `truth.indices`, with the data's category ids; results of
            unknown categories are ignored.
        task: `segm` or `bbox`, of which the IoU counts.

    Raises:
        ValueError: when the number of images is not that of `truth`.
    """
    labels = {category.id: label for label, category in enumerate(truth.source.categories)}
    images = zip(results, truth.annotations, strict=True)
    return _joined([_match_image(rows, known, labels, task) for rows, known in images])


def _match_image(
    results: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    label_of: Mapping[int | str, int],
    task: str,
) -> Matches:
    """Matches the detections of one image with its annotations, whose category ids are label + 1."""
    known = np.array([i for i, row in enumerate(results) if row["category_id"] in label_of], int)
    scores = np.array([results[i]["score"] for i in known], np.float64)
    order = np.argsort(-scores, kind="stable")
    places, scores = known[order], scores[order]
    labels = np.array([label_of[results[i]["category_id"]] for i in places], np.int64)
    object_labels = np.array([a["category_id"] - 1 for a in annotations], np.int64)
    crowd = np.array([a["iscrowd"] for a in annotations], np.bool_)
    iou = _iou([results[i] for i in places], annotations, task)
    same = labels[:, None] == object_labels
    in_crowd = (same & crowd & (iou >= FOREGROUND)).any(axis=1)
    # A last column, an object that nothing overlaps, spares every step below a case without objects.
    iou, same = (np.pad(array[:, ~crowd], ((0, 0), (0, 1))) for array in (iou, same))
    own, other = np.where(same, iou, 0), np.where(same, 0, iou)
    found = _greedy(own)
    counted = (found >= 0) | ~in_crowd
    found, own, other = found[counted], own[counted], other[counted]
    best_own, best_other = own.max(axis=1), other.max(axis=1)
    kinds = np.select(
        [
            found >= 0,
            (best_own >= BACKGROUND) & (best_own < FOREGROUND),
            best_other >= FOREGROUND,
            best_own >= FOREGROUND,
            np.maximum(best_own, best_other) <= BACKGROUND,
        ],
        [-1, LOCALIZATION, CLASSIFICATION, DUPLICATE, NO_OBJECT],
        BOTH,
    )
    displaced, confused = kinds == LOCALIZATION, kinds == CLASSIFICATION
    detections, objects = np.nonzero(other >= FOREGROUND)
    falling = np.lexsort((-other[detections, objects], detections))
    return Matches(
        scores=scores[counted],
        labels=labels[counted],
        images=np.zeros(len(found), np.int64),
        places=places[counted],
        found=found,
        kinds=kinds,
        meant=np.select([displaced, confused], [own.argmax(axis=1), other.argmax(axis=1)], -1),
        object_labels=object_labels[~crowd],
        object_images=np.zeros(np.count_nonzero(~crowd), np.int64),
        object_places=np.flatnonzero(~crowd),
        overlaps=np.stack((detections, objects), axis=1)[falling],
    )


def _iou(
    results: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], task: str
) -> Floats:
    """Returns [results, annotations] f64, for a crowd the share of the result in it, as in COCO."""
    from pycocotools import mask as coco_mask

    if not results or not annotations:
        return np.zeros((len(results), len(annotations)))
    shapes: list[Any] = [
        [entry[_FIELDS[task]] for entry in entries] for entries in (results, annotations)
    ]
    if task == "bbox":
        shapes = [np.array(boxes, np.float64) for boxes in shapes]
    return np.asarray(coco_mask.iou(*shapes, [a["iscrowd"] for a in annotations]))


def _greedy(iou: Floats) -> Integers:
    """Gives each detection, by falling score, the free object of its class that it overlaps most.

    Args:
        iou: [D, O] f64, 0 for other classes.

    Returns:
        [D] i64, the object; -1 if no free one has at least the IoU `FOREGROUND`.
    """
    found = np.full(len(iou), -1, np.int64)
    free = np.ones(iou.shape[1], np.bool_)
    for detection in np.flatnonzero(iou.max(axis=1) >= FOREGROUND):
        candidates = np.where(free, iou[detection], 0)
        best = (
            len(candidates) - 1 - candidates[::-1].argmax()
        )  # among equal ones COCO takes the last
        if candidates[best] >= FOREGROUND:
            found[detection] = best
            free[best] = False
    return found


def _joined(images: Sequence[Matches]) -> Matches:
    """Returns the matches of all images, with objects and detections counted through them."""
    detections = np.array([len(image.scores) for image in images])
    objects = np.array([len(image.object_labels) for image in images])
    before, objects_before = (np.cumsum(counts) - counts for counts in (detections, objects))
    offset = np.repeat(objects_before, detections)

    def column(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(image, name) for image in images])

    found, meant = column("found"), column("meant")
    shifts = zip(before, objects_before, strict=True)
    return Matches(
        scores=column("scores"),
        labels=column("labels"),
        images=np.repeat(np.arange(len(images)), detections),
        places=column("places"),
        found=np.where(found >= 0, found + offset, -1),
        kinds=column("kinds"),
        meant=np.where(meant >= 0, meant + offset, -1),
        object_labels=column("object_labels"),
        object_images=np.repeat(np.arange(len(images)), objects),
        object_places=column("object_places"),
        overlaps=np.concatenate(
            [image.overlaps + shift for image, shift in zip(images, shifts, strict=True)]
        ),
    )


def by_class(labels: Integers, classes: int) -> list[Integers]:
    """Returns the places of each class's entries in `labels`, in their order."""
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(classes + 1))
    return [order[start:end] for start, end in pairwise(ends.tolist())]


def interpolated_precision(scores: Floats, right: Booleans, objects: int) -> Floats:
    """Returns [101] f64, the largest precision at each of `RECALLS` or above, as in COCO.

    Its mean is the AP. Among equal scores, the order given counts.

    Args:
        scores: [D] f64.
        right: [D], whether each detection matches an object.
        objects: the number of objects, at least 1.
    """
    right = right[np.argsort(-scores, kind="stable")]
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    best_after = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return np.asarray(best_after[np.searchsorted(hits / objects, RECALLS)])


def ap50(matches: Matches, classes: int, *, fixed: int | None = None) -> float:
    """Returns the AP at the IoU `FOREGROUND`, with one kind of error fixed by TIDE's oracle.

    The oracles are those of TIDE's program (https://github.com/dbolya/tide, `TIDERun.fix_errors`). Among
    the errors of classification and localization that mean an object that is not found, the one of the
    highest score gets the class or the place of the object, and becomes right. Missed objects do not
    count. All other detections with an error of this kind are left out.

    Args:
        matches: all matches.
        classes: the number of classes.
        fixed: an index of `KINDS`; None to fix nothing.

    Returns:
        the mean over the classes that have objects, in 0..1; -1 if no class has any.
    """
    labels, objects, right = matches.labels.copy(), matches.object_labels, matches.found >= 0
    kept = np.ones_like(right) if fixed is None else matches.kinds != fixed
    if fixed == MISSED:
        objects = objects[~matches.missed_by(np.ones_like(right))]
    elif fixed in (CLASSIFICATION, LOCALIZATION):
        best = _best_to_fix(matches)
        best = best[matches.kinds[best] == fixed]
        labels[best] = objects[matches.meant[best]]
        right[best] = kept[best] = True
    scores, labels, right = matches.scores[kept], labels[kept], right[kept]
    counts = np.bincount(objects, minlength=classes).tolist()
    curves = [
        interpolated_precision(scores[places], right[places], count)
        for places, count in zip(by_class(labels, classes), counts, strict=True)
        if count
    ]
    return float(np.mean(curves)) if curves else -1.0


def _best_to_fix(matches: Matches) -> Integers:
    """Returns, for each object that is meant but not found, the detection of the highest score."""
    lost = ~matches.found_by(np.ones(len(matches.scores), np.bool_))
    means = np.flatnonzero(matches.meant >= 0)
    means = means[lost[matches.meant[means]]]
    ranked = means[np.lexsort((-matches.scores[means], matches.meant[means]))]
    return np.asarray(ranked[np.unique(matches.meant[ranked], return_index=True)[1]])
