"""The differences that are allowed between two backends' results, by precision."""

from __future__ import annotations

from dataclasses import dataclass

from comask.runtime.backends.base import Array

SPAN_OF_TIES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The differences allowed between results of one precision; the defaults are those of fp32.

    Attributes:
        relative: max|a-b| / max|a| of a tensor.
        box: pixels of the resized image.
        box_side: additional allowance as a share of a box's longer side.
        score: absolute difference of two scores, of detections or proposals.
        mask: absolute difference of two probabilities of a mask's pixel.
        tie: two scores that are at most this far apart may change places.
        iou_tie: an IoU of proposals this near to NMS' threshold may fall on either side of it.
        contested: share of an image's proposals that near-ties may exchange; two always may.
        contested_detections: the same share for detections.
        alike: both shares if the scores of the reference's proposals span less than 20 ties, as an
            untrained network's do; rounding alone then decides which of them win.
    """

    relative: float = 1e-3
    box: float = 0.05
    box_side: float = 0.0
    score: float = 1e-3
    mask: float = 1e-2
    tie: float = 1e-4
    iou_tie: float = 1e-4
    contested: float = 0.01
    contested_detections: float = 0.05
    alike: tuple[float, float] = (0.01, 0.05)

    def shares(self, scores: Array) -> tuple[float, float]:
        """Returns the shares of proposals and detections that may be exchanged, given proposal scores."""
        if len(scores) and float(scores.max() - scores.min()) < SPAN_OF_TIES * self.tie:
            return self.alike
        return self.contested, self.contested_detections


# f16 rounds by up to u = 2^-11 = 5e-4. The roundings of some sixty layers in a row add up like a random
# walk, to 8u = 4e-3 of a map's largest value; a wrong weight or mean exceeds twice that
# (tests/test_fp16.py). Deltas and offsets are predicted from such maps in units of an anchor or RoI, so
# the error of a box is proportional to its side. Logits up to 10 have an error of 2e-3 of that (half of
# what the maps may have), a probability at most a quarter of that: 5e-3 per score, twice that between two
# scores. A mask may differ more: if a cell's confidence rounds across the threshold of ½, the box in
# which the mask is drawn moves. If the four edges of an intersection move by box_side, the IoU changes by
# about 2.5 times that. The trained demo exchanges next to nothing, so a trained network may exchange
# little. The scores of an untrained comask-r50 lie within 0.006 of one another for proposals and 0.015
# for detections; 6 % and 20 % of them have no partner.
TOLERANCES = {
    "fp32": Tolerance(),
    "fp16": Tolerance(
        relative=1e-2,
        box_side=2e-3,
        score=1e-2,
        mask=5e-2,
        tie=5e-3,
        iou_tie=5e-3,
        contested=0.02,
        contested_detections=0.05,
        alike=(0.08, 0.25),
    ),
}
