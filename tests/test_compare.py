"""The judge itself: it passes equals, excuses near-ties and nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from comask.config import ModelConfig, PreprocessConfig
from comask.preprocess import prepare
from comask.runtime.backends.base import Array, Stages
from comask.runtime.compare import Comparison, compare_stages, match_boxes, relative_error
from comask.runtime.tolerances import TOLERANCES, Tolerance


class Fixed:
    """A session that returns the same whatever it is fed."""

    inputs = outputs = ()

    def __init__(self, outputs: dict[str, Array]) -> None:
        self._outputs = outputs

    def run(self, feeds: object, keep: object = ()) -> dict[str, Array]:
        return {name: array.copy() for name, array in self._outputs.items()}

    def close(self) -> None: ...


def outputs(scores: list[float]) -> tuple[dict[str, Array], dict[str, Array]]:
    count = len(scores)
    boxes = np.array([[[30 * i, 0, 30 * i + 20, 20] for i in range(count)]], np.float32)
    stage1 = {f"p{k}": np.ones((1, 2, 4, 4), np.float32) * k for k in (2, 3, 4, 5)}
    stage1 |= {"proposals": boxes, "proposal_scores": np.array([scores], np.float32)}
    stage2 = {
        "num_detections": np.array([count], np.int32),
        "boxes": boxes,
        "scores": np.array([scores], np.float32),
        "labels": np.arange(count, dtype=np.int32)[None] % 3,
        "masks": np.full((1, count, 28, 28), 0.7, np.float32),
    }
    for name in ("boxes", "scores", "labels", "masks"):  # room for more: the list is not full
        padding = [(0, 0), (0, 2)] + [(0, 0)] * (stage2[name].ndim - 2)
        stage2[name] = np.pad(stage2[name], padding)
    return stage1, stage2


def compare(
    first: tuple[dict[str, Array], ...], second: tuple[dict[str, Array], ...]
) -> Comparison:
    result = Comparison()
    a, b = (Stages(name, *map(Fixed, parts)) for name, parts in (("a", first), ("b", second)))
    image = prepare(np.zeros((32, 64, 3), np.uint8), PreprocessConfig(short_side=32))
    model = ModelConfig(num_classes=8, nms_iou=0.3, score_threshold=0.05)
    compare_stages(a, b, [image], model, tolerance=Tolerance(), into=result)
    return result


def test_equals_agree_in_any_order() -> None:
    first, second = outputs([0.9, 0.8, 0.7]), outputs([0.9, 0.8, 0.7])
    order = [2, 0, 1]
    for name in ("boxes", "scores", "labels", "masks"):
        second[1][name][:, :3] = second[1][name][:, order]
    result = compare(first, second)
    assert result.failures == []
    assert (result.detections, result.contested_detections) == (3, 0)


def test_each_difference_is_named() -> None:
    for stage, name, change in [
        (0, "p3", 1.01), (1, "scores", 1.01), (1, "boxes", 1.001), (1, "masks", 1.05),
    ]:  # fmt: skip
        second = outputs([0.9, 0.8, 0.7])
        second[stage][name] = second[stage][name] * np.float32(change)
        (first_failure, *_) = compare(outputs([0.9, 0.8, 0.7]), second).failures
        assert name in first_failure or "detections" in first_failure


def test_a_wrong_label_and_a_lost_detection_fail() -> None:
    wrong = outputs([0.9, 0.8, 0.7])
    wrong[1]["labels"][0, 1] = 7
    assert len(compare(outputs([0.9, 0.8, 0.7]), wrong).failures) == 2
    lost = outputs([0.9, 0.8, 0.7])
    lost[1]["num_detections"][0] = 2
    assert "missing" in compare(outputs([0.9, 0.8, 0.7]), lost).failures[0]


def test_a_detection_at_the_threshold_is_excused() -> None:
    lost = outputs([0.9, 0.8, 0.05005])
    lost[1]["num_detections"][0] = 2
    result = compare(outputs([0.9, 0.8, 0.05005]), lost)
    assert result.failures == []
    assert result.contested_detections == 1


def test_a_lost_proposal_needs_a_near_tie() -> None:
    """Five hundred of them: 1 % would let five go, but not those that no rounding explains."""
    scores = np.linspace(0.9, 0.1, 500)
    first, lost, last = outputs(scores.tolist()), outputs(scores.tolist()), outputs(scores.tolist())
    for second, place in ((lost, 250), (last, 499)):
        for name in ("proposals", "proposal_scores"):
            kept = np.delete(second[0][name], place, axis=1)
            second[0][name] = np.concatenate((kept, np.zeros_like(kept[:, :1])), axis=1)
    (failure,) = compare(first, lost).failures
    assert "proposals: missing" in failure
    assert compare(first, last).failures == []
    # an overlapping rival of the same score won instead
    rival = outputs(scores.tolist())
    rival[0]["proposals"][0, 250] += np.float32(2)
    result = compare(first, rival)
    assert (result.failures, result.contested_proposals) == ([], 2)
    rival[0]["proposals"][0, 250] += np.float32(18)  # no overlap
    assert len(compare(first, rival).failures) == 2


def test_an_overlap_at_the_threshold_of_nms_may_fall_on_either_side() -> None:
    """A box of a far higher score overlaps the lost one by exactly the threshold, or by a little more."""
    scores = np.linspace(0.9, 0.1, 500)
    threshold = ModelConfig(num_classes=8).rpn_nms_iou
    shift = 20 * (1 - threshold) / (1 + threshold)  # of two boxes whose sides are 20 pixels
    for further, excused in ((0.0, True), (-0.05, False), (0.05, False)):
        first, lost = outputs(scores.tolist()), outputs(scores.tolist())
        for stage1 in (first[0], lost[0]):  # place 10 would suppress place 250, or not
            stage1["proposals"][0, 250] = stage1["proposals"][0, 10]
            stage1["proposals"][0, 250, [0, 2]] += np.float32(shift + further)
        for name in ("proposals", "proposal_scores"):
            kept = np.delete(lost[0][name], 250, axis=1)
            lost[0][name] = np.concatenate((kept, np.zeros_like(kept[:, :1])), axis=1)
        found = compare(first, lost)
        assert (not found.failures, found.contested_proposals) == (excused, int(excused))


def test_ties_do_not_excuse_every_detection() -> None:
    """All scores alike, all boxes moved: each finds a rival of its score beside it."""
    scores = [0.5] * 30
    moved = outputs(scores)
    moved[1]["boxes"] = moved[1]["boxes"] + np.float32(1.0)
    assert any("near-tie" in failure for failure in compare(outputs(scores), moved).failures)


def test_nan_never_agrees() -> None:
    for stage, name in [(0, "p2"), (1, "masks"), (1, "scores"), (1, "boxes")]:
        broken = outputs([0.9, 0.8])
        broken[stage][name] = np.full_like(broken[stage][name], np.nan)
        assert compare(outputs([0.9, 0.8]), broken).failures


@given(st.permutations(range(6)))
def test_match_boxes_finds_a_permutation(order: list[int]) -> None:
    boxes = np.arange(24, dtype=np.float32).reshape(6, 4) * 3
    partner = match_boxes(boxes, boxes[order] + 0.01, 0.05)
    assert [order[p] for p in partner] == list(range(6))
    assert (match_boxes(boxes, boxes + 1, 0.05) == -1).all()
    assert (match_boxes(boxes, boxes[:0], 0.05) == -1).all()


def test_relative_error() -> None:
    a = np.array([1.0, -4.0])
    assert relative_error(a, a) == 0
    assert (
        relative_error(a, a + 0.04) == np.float64(0.01).item()
        or abs(relative_error(a, a + 0.04) - 0.01) < 1e-9
    )
    assert relative_error(a, a[:1]) == float("inf")


def test_more_may_be_exchanged_where_all_scores_are_alike() -> None:
    tolerance = TOLERANCES["fp16"]
    alike, spread = np.linspace(0.5, 0.5 + 19 * tolerance.tie, 50), np.linspace(0.05, 0.99, 50)
    assert tolerance.shares(alike) == (0.08, 0.25)
    assert tolerance.shares(spread) == (0.02, 0.05)
    assert tolerance.shares(spread[:0]) == (0.02, 0.05)
    assert TOLERANCES["fp32"].shares(alike) == (0.01, 0.05)
