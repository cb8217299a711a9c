"""Compares the results of two backends: tensors by relative error, boxes as sets.

Boxes are compared as sets because equal scores have no order: rounding alone decides which of two boxes
comes first, and which of two nearly equal boxes survives NMS. Such near-ties are told apart from errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from comask.config import ModelConfig
from comask.kernels.launch import LEVEL_STRIDES
from comask.preprocess import Prepared, stacked
from comask.runtime.backends.base import Array, Stages
from comask.runtime.tolerances import Tolerance

PYRAMID = tuple(LEVEL_STRIDES)


@dataclass(frozen=True, slots=True)
class Boxes:
    """One image's boxes in descending order of their scores.

    Attributes:
        boxes: [N, 4] f32 `xyxy` in pixels.
        scores: [N] f32.
        labels: [N] int; boxes of different labels do not compete.
        masks: [N, 28, 28] f32 probabilities; None for proposals.
        mask_boxes: [N, 4] f32 `xyxy` of the masks; None if they are `boxes`.
        class_scores: [N] f32, by which the NMS chose if `scores` are other ones since; else None.
    """

    boxes: Array
    scores: Array
    labels: Array
    masks: Array | None = None
    mask_boxes: Array | None = None
    class_scores: Array | None = None

    @property
    def ranks(self) -> Array:
        """The scores by which the NMS chose."""
        return self.scores if self.class_scores is None else self.class_scores

    @property
    def edges(self) -> Array:
        """The coordinates of each box and, if it has another one, of its mask's, [N, 4] or [N, 8]."""
        if self.mask_boxes is None:
            return self.boxes
        return np.concatenate((self.boxes, self.mask_boxes), axis=1)


def match_boxes(a: Array, b: Array, limit: float | Array) -> Array:
    """Finds a partner in `b` for each box of `a`, whose edges are at most `limit` pixels away.

    Args:
        a: [N, 4], or [N, 8] for pairs of boxes.
        b: [M, 4] or [M, 8]; each box is used at most once.
        limit: pixels, one number for all boxes of `a` or [N].

    Returns:
        i64 [N], the partner's index in `b`; -1 without a partner.
    """
    limits = np.broadcast_to(limit, len(a))
    partner = np.full(len(a), -1, dtype=np.int64)
    free = np.ones(len(b), dtype=bool)
    for i, box in enumerate(a):
        distance = np.where(free, np.abs(b - box).max(axis=1, initial=0.0), np.inf)
        best = int(distance.argmin()) if len(b) else -1
        if best >= 0 and distance[best] <= limits[i]:
            partner[i] = best
            free[best] = False
    return partner


def is_contested(
    rows: Boxes,
    place: int,
    rivals: Boxes,
    nms_iou: float,
    cuts: Sequence[float],
    tie: float,
    iou_tie: float = 0.0,
) -> bool:
    """Returns whether rounding alone may explain that a box has no partner.

    It may if the box's score lies at one of `cuts`; if an overlapping rival with its label and nearly its
    score won the NMS in the other backend; or if a rival with a higher score overlaps it so that the NMS
    may find either.

    Args:
        rows: the boxes of one backend.
        place: the index of the box in `rows`.
        rivals: the boxes of the other backend.
        nms_iou: the IoU threshold of the NMS that both went through.
        cuts: scores below which boxes were dropped.
        tie: two scores that are at most this far apart may change places.
        iou_tie: an IoU this near to the threshold may fall on either side of it; 0 for boxes that have
            moved since NMS.
    """
    score = rows.ranks[place]
    if any(abs(score - cut) <= tie for cut in cuts):
        return True
    ious = box_ious(rivals.boxes, rows.boxes[place])
    alike = rivals.labels == rows.labels[place]
    close = alike & (np.abs(rivals.ranks - score) <= tie)
    # Refinement has moved the boxes since NMS, so half of its threshold counts as an overlap.
    if (ious[close] > nms_iou / 2).any():
        return True
    higher = alike & (rivals.ranks > score)
    return bool((np.abs(ious[higher] - nms_iou) <= iou_tie).any()) and iou_tie > 0


def box_ious(boxes: Array, box: Array) -> Array:
    """Returns the IoU of each of the boxes [N, 4] with one box [4]."""
    side = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    intersection = side.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    overlap: Array = intersection / np.maximum(areas - intersection, 1e-6)
    return overlap


@dataclass(kw_only=True)
class Comparison:
    """The result of a comparison; `failures` is empty if the backends agree.

    Attributes:
        relative: the largest relative error of each tensor, by name.
        proposals: the number of compared proposals.
        contested_proposals: the number of proposals that have no partner because of a near-tie.
        detections: the number of compared detections.
        contested_detections: the number of detections that have no partner because of a near-tie.
        box: largest distance of matched detections' edges in pixels of the resized image.
        score: largest difference of matched scores.
        mask: largest difference of matched mask probabilities.
        degenerate: whether more boxes were exchanged than a trained network may exchange, which passed
            because the proposals' scores were all alike.
        failures: one sentence for each failure.
    """

    relative: dict[str, float] = field(default_factory=dict)
    proposals: int = 0
    contested_proposals: int = 0
    detections: int = 0
    contested_detections: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    degenerate: bool = False
    failures: list[str] = field(default_factory=list)


def relative_error(a: Array, b: Array) -> float:
    """Returns max|a-b| / max|a|; infinity if shapes differ or either has NaN or infinite values."""
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    scale = float(np.abs(a).max(initial=0.0))
    difference = float(np.abs(a.astype(np.float64) - b).max(initial=0.0))
    return difference / scale if scale else difference


def compare_stages(
    reference: Stages,
    other: Stages,
    batch: Sequence[Prepared],
    model: ModelConfig,
    *,
    tolerance: Tolerance,
    into: Comparison,
) -> None:
    """Runs one batch on both backends and adds the differences to `into`.

    Stage 2 of both gets the reference's stage 1 outputs, so that each stage is judged on its own.

    Args:
        reference: the reference backend, usually PyTorch.
        other: the backend to compare.
        batch: images on canvases of one size.
        model: the model's configuration, for its thresholds.
        tolerance: the tolerance for the other backend's precision.
        into: collects the result.
    """
    images, sizes = stacked(batch)
    where = f"canvas {images.shape[2]}x{images.shape[1]}, batch {len(images)}"
    places = [f"image {i} of {where}" for i in range(len(images))]

    feeds: dict[str, Array] = {"images": images, "image_sizes": sizes}
    expected, found = reference.stage1.run(feeds), other.stage1.run(feeds)
    for name in PYRAMID:
        error = relative_error(expected[name], found[name])
        into.relative[name] = max(into.relative.get(name, 0.0), error)
        if not error <= tolerance.relative:
            into.failures.append(
                f"{name}: relative error {error:.2g}, at most {tolerance.relative:g} expected ({where})"
            )
    shares = []  # for each image, the shares that near-ties may exchange
    for i, place in enumerate(places):
        match = _Match(_proposals(expected, i), _proposals(found, i), place, tolerance, into)
        shares.append(tolerance.shares(match.expected.scores))
        match.compare_proposals(model, shares[i][0])

    feeds = {**expected, "image_sizes": sizes}
    expected, found = reference.stage2.run(feeds), other.stage2.run(feeds)
    for i, place in enumerate(places):
        counts = [int(outputs["num_detections"][i]) for outputs in (expected, found)]
        if min(counts) < 0:
            into.failures.append(
                f"num_detections: {counts[1]} where {counts[0]} is expected; -1 means that scores are "
                f"not finite ({place})"
            )
            continue
        match = _Match(_detections(expected, i), _detections(found, i), place, tolerance, into)
        match.compare_detections(model, expected["scores"].shape[1], shares[i][1])


def _proposals(outputs: Mapping[str, Array], image: int) -> Boxes:
    """Returns one image's proposals without the padding."""
    scores = outputs["proposal_scores"][image]
    sound = scores > 0
    labels = np.zeros(int(sound.sum()), dtype=np.int64)
    return Boxes(outputs["proposals"][image][sound], scores[sound], labels)


def _detections(outputs: Mapping[str, Array], image: int) -> Boxes:
    """Returns one image's detections without the padding."""
    count = int(outputs["num_detections"][image])
    names = ("boxes", "scores", "labels", "masks", "mask_boxes", "class_scores")
    return Boxes(**{name: outputs[name][image][:count] for name in names if name in outputs})


@dataclass(frozen=True)
class _Match:
    """The boxes of one image in two backends.

    Attributes:
        expected: the reference's boxes.
        found: the other backend's boxes.
        where: the place that failures name.
        tolerance: the tolerance for the other backend's precision.
        into: collects the result.
    """

    expected: Boxes
    found: Boxes
    where: str
    tolerance: Tolerance
    into: Comparison

    @cached_property
    def partner(self) -> Array:
        """Index in `found` of the partner of each box in `expected`, i64 [N]; -1 without a partner."""
        partner = np.full(len(self.expected.scores), -1, dtype=np.int64)
        for label in np.unique(self.expected.labels):
            mine, theirs = (
                np.flatnonzero(rows.labels == label) for rows in (self.expected, self.found)
            )
            boxes = self.expected.boxes[mine]
            sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0.0)
            limits = self.tolerance.box + self.tolerance.box_side * sides
            local = match_boxes(self.expected.edges[mine], self.found.edges[theirs], limits)
            partner[mine[local >= 0]] = theirs[local[local >= 0]]
        return partner

    def compare_proposals(self, model: ModelConfig, share: float) -> None:
        """Compares stage 1's proposals, of which `share` may lack a partner."""
        self.into.proposals += len(self.expected.scores)
        difference = self._difference("scores")
        if not difference <= self.tolerance.score:
            self._fail(f"proposal_scores: differ by {difference:.2g}")
        cuts = [float(rows.scores[-1]) for rows in (self.expected, self.found) if len(rows.scores)]
        shares = self.tolerance.contested, share
        self.into.contested_proposals += self._lone(
            "proposals", model.rpn_nms_iou, cuts, shares, self.tolerance.iou_tie
        )

    def compare_detections(self, model: ModelConfig, full: int, share: float) -> None:
        """Compares stage 2's detections, at most `full`, of which `share` may lack a partner."""
        self.into.detections += len(self.expected.scores)
        for name, tensor, allowed in (
            ("box", "edges", np.inf),  # partners are near by definition
            ("score", "scores", self.tolerance.score),
            ("score", "class_scores", self.tolerance.score),
            ("mask", "masks", self.tolerance.mask),
        ):
            if getattr(self.expected, tensor) is None:
                continue
            difference = self._difference(tensor)
            setattr(self.into, name, max(getattr(self.into, name), difference))
            if not difference <= allowed:
                self._fail(f"{tensor}: differ by {difference:.2g}, at most {allowed:g} expected")
        cuts = [model.score_threshold]
        for rows in (self.expected, self.found):
            if 0 < len(rows.scores) == full:
                cuts.append(float(rows.ranks.min()))
        # If all scores are alike, a tie excuses any single detection, but not most of them.
        shares = self.tolerance.contested_detections, share
        self.into.contested_detections += self._lone("detections", model.nms_iou, cuts, shares)

    def _difference(self, tensor: str) -> float:
        """Returns the largest difference between partners in one tensor."""
        matched = np.flatnonzero(self.partner >= 0)
        a = getattr(self.expected, tensor)[matched]
        b = getattr(self.found, tensor)[self.partner[matched]]
        return float(np.abs(a - b).max(initial=0.0))

    def _lone(
        self,
        what: str,
        nms_iou: float,
        cuts: Sequence[float],
        shares: tuple[float, float],
        iou_tie: float = 0.0,
    ) -> int:
        """Counts the boxes whose missing partner a near-tie explains; each other one is a failure.

        Args:
            what: the name of the boxes.
            nms_iou: the IoU threshold of the NMS that they went through.
            cuts: scores below which boxes were dropped.
            shares: the share that may usually lack a partner, and the share that may here.
            iou_tie: see `is_contested`.
        """
        lone = 0
        surplus = np.setdiff1d(np.arange(len(self.found.scores)), self.partner)
        for kind, rows, places, rivals in (
            ("missing", self.expected, np.flatnonzero(self.partner < 0), self.found),
            ("surplus", self.found, surplus, self.expected),
        ):
            for place in places.tolist():
                tie = self.tolerance.tie
                if is_contested(rows, place, rivals, nms_iou, cuts, tie, iou_tie):
                    lone += 1
                else:
                    self._fail(
                        f"{what}: {kind} label {rows.labels[place]} with score "
                        f"{rows.scores[place]:.4f} at {np.round(rows.boxes[place], 1).tolist()}"
                    )
        count = len(self.expected.scores)
        usual, most = (max(2, share * count) for share in shares)
        if lone > most:
            self._fail(
                f"{what}: {lone} of {count} have no partner because of near-ties, at most {most:.0f} may"
            )
        elif lone > usual:
            self.into.degenerate = True
        return lone

    def _fail(self, text: str) -> None:
        self.into.failures.append(f"{text} ({self.where})")
