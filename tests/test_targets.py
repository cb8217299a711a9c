"""Matching and box code against torchvision's; sampling, jitter and mask targets by rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from strategies import FEW, boxes, cropped, random_boxes, seeds
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import roi_align

from comask.data.training_set import Target
from comask.models.boxes import clip_boxes, decode_boxes, encode_boxes, paired_iou
from comask.training.targets import (
    BACKGROUND,
    IGNORE,
    jitter,
    mask_targets,
    match,
    sample,
    without_crowds,
)


def target(masks: Tensor, scale: tuple[float, float] = (1.0, 1.0)) -> Target:
    """One whose boxes and labels do not matter; `scale` is (x, y) bitmap pixels a pixel."""
    count = len(masks)
    return Target(
        boxes=torch.zeros(count, 4),
        crowds=torch.zeros(0, 4),
        labels=torch.zeros(count, dtype=torch.int64),
        masks=cropped(masks),
        mask_scale=torch.tensor(scale * 2),
    )


@FEW
@given(seed=seeds, objects=st.integers(1, 6), keep_best=st.booleans())
def test_match_equals_torchvisions(seed: int, objects: int, keep_best: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    iou = torch.rand(objects, 40, generator=generator)
    iou = (iou * 20).round() / 20  # ties, and overlaps of exactly a threshold
    iou[0] *= 0.4  # an object with low-quality matches alone
    positive, negative = torch.tensor(0.7).item(), torch.tensor(0.3).item()
    matcher = Matcher(positive, negative, allow_low_quality_matches=keep_best)
    ours = match(iou, positive, negative, keep_best=keep_best)
    assert (BACKGROUND, IGNORE) == (Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS)
    assert torch.equal(ours, matcher(iou))


@pytest.mark.parametrize("keep_best", [True, False])
def test_without_objects_all_is_background(keep_best: bool) -> None:
    matches = match(torch.zeros(0, 5), 0.7, 0.3, keep_best=keep_best)
    assert matches.dtype == torch.int64
    assert matches.tolist() == [BACKGROUND] * 5


@FEW
@given(seed=seeds, crowds=st.integers(0, 4))
def test_background_in_a_crowd_is_ignored_as_pycocotools_measures_it(
    seed: int, crowds: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    candidates = random_boxes(generator, 60, 100, 40)
    regions = random_boxes(generator, crowds, 80, 80)
    matches = torch.randint(-2, 3, (60,), generator=generator)
    found = without_crowds(matches, candidates, regions)

    def corners_to_sizes(boxes: Tensor) -> np.ndarray:
        return torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1).double().numpy()

    inside = np.zeros(60, bool)
    if crowds:  # of a crowd COCO's "IoU" is the share of the detection's own area
        shares = coco_mask.iou(
            corners_to_sizes(candidates), corners_to_sizes(regions), [1] * crowds
        )
        sure = np.abs(shares - 0.5).min(axis=1) > 1e-4
        inside = shares.max(axis=1) >= 0.5
    else:
        sure = ~inside
    expected = np.where(inside & (matches.numpy() == BACKGROUND), IGNORE, matches.numpy())
    assert found.numpy()[sure].tolist() == expected[sure].tolist()


def test_half_of_its_own_area_is_enough_and_objects_stay() -> None:
    crowd = torch.tensor([[0.0, 0, 10, 10]])
    candidates = torch.tensor([[5.0, 0, 15, 10], [5.1, 0, 15.1, 10], [2, 2, 3, 3], [0, 0, 0, 0]])
    background = torch.full((4,), BACKGROUND)
    assert without_crowds(background, candidates, crowd).tolist() == [
        IGNORE, BACKGROUND, IGNORE, BACKGROUND,
    ]  # fmt: skip
    objects = torch.tensor([0, 1, 0, IGNORE])
    assert torch.equal(without_crowds(objects, candidates, crowd), objects)


@FEW
@given(
    seed=seeds,
    count=st.integers(0, 80),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    present=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5)),
)
def test_sample_respects_count_and_fraction(
    seed: int, count: int, fraction: float, present: tuple[int, int, int]
) -> None:
    torch.manual_seed(seed)
    num_positive, num_negative, _ = present
    values = torch.tensor([3, BACKGROUND, IGNORE])
    matches = values.repeat_interleave(torch.tensor(present))
    matches = matches[torch.randperm(len(matches))]
    positive, negative = sample(matches, count, fraction)
    expected = min(num_positive, int(count * fraction))
    assert len(positive) == expected == len(positive.unique())
    assert len(negative) == min(num_negative, count - expected) == len(negative.unique())
    assert (matches[positive] == 3).all()
    assert (matches[negative] == BACKGROUND).all()


def test_every_candidate_can_be_sampled() -> None:
    torch.manual_seed(0)
    matches = torch.tensor([0] * 6 + [BACKGROUND] * 6)
    draws = [torch.cat(sample(matches, 4, 0.5)).tolist() for _ in range(100)]
    assert {index for draw in draws for index in draw} == set(range(12))


@FEW
@given(candidates=boxes(20, size=200), seed=seeds, amount=st.sampled_from([0.0, 0.05, 0.15]))
def test_jitter_moves_centre_and_size_by_at_most_its_amount(
    candidates: Tensor, seed: int, amount: float
) -> None:
    torch.manual_seed(seed)
    candidates = candidates + 100  # clear of the image's edges
    moved = jitter(candidates, amount, 10_000, 10_000)
    size = candidates[:, 2:] - candidates[:, :2]
    grown = (moved[:, 2:] - moved[:, :2]) / size - 1
    centre = (moved[:, 2:] + moved[:, :2] - candidates[:, 2:] - candidates[:, :2]) / 2 / size
    rounding = 2e-4  # of f32 coordinates up to 1000, in units of sides of at least 1
    assert grown.abs().max() <= amount + rounding
    assert centre.abs().max() <= amount + rounding


def test_jitter_fills_its_range_without_bias() -> None:
    torch.manual_seed(1)
    fixed = torch.tensor([[1000.0, 2000, 1100, 2200]]).expand(4000, 4)
    moved = jitter(fixed, 0.15, 10_000, 10_000)
    size = torch.tensor([100.0, 200])
    grown = (moved[:, 2:] - moved[:, :2]) / size - 1
    centre = (moved[:, 2:] + moved[:, :2] - fixed[:, 2:] - fixed[:, :2]) / 2 / size
    for change in (*grown.T, *centre.T):
        assert change.min() < -0.145
        assert change.max() > 0.145
        assert change.mean().abs() < 0.01
    assert torch.corrcoef(torch.stack((*grown.T, *centre.T))).triu(1).abs().max() < 0.1


@FEW
@given(candidates=boxes(20, size=200), seed=seeds)
def test_jittered_boxes_stay_in_the_image(candidates: Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    height, width = 150, 220
    moved = jitter(candidates, 0.15, height, width)
    assert (moved >= 0).all()
    assert (moved[:, 0::2] <= width).all()
    assert (moved[:, 1::2] <= height).all()
    assert (moved[:, 2:] >= moved[:, :2]).all()


@pytest.mark.parametrize(("scale_x", "scale_y"), [(1.0, 1.0), (2.0, 0.5), (0.25, 4.0)])
def test_mask_targets_are_direct_crops(scale_x: float, scale_y: float) -> None:
    masks = torch.zeros(3, 90, 100, dtype=torch.uint8)
    masks[0, 15:33, 22:47] = 1
    masks[2, 10:80, 30:32] = 1
    crops = torch.tensor([[20.0, 10, 48, 38], [4, 60, 32, 88], [21, 11, 49, 39]])  # of bitmaps
    rois = crops / torch.tensor([scale_x, scale_y] * 2)
    objects = torch.tensor([0, 2, 0])
    cut = mask_targets(target(masks, (scale_x, scale_y)), rois, objects, 28)
    assert cut.dtype == torch.float32
    for i, (x1, y1, x2, y2) in enumerate(crops.int().tolist()):
        assert torch.equal(cut[i], masks[objects[i], y1:y2, x1:x2].float())
        assert 0 < cut[i].sum() < 28 * 28


def test_a_target_pixel_is_set_where_half_of_its_area_is() -> None:
    bitmap = np.random.default_rng(0).integers(0, 2, (64, 96), dtype=np.uint8)
    roi = torch.tensor([[8.0, 4, 92, 60]])  # a target pixel covers 2 rows and 3 columns
    cut = mask_targets(target(torch.from_numpy(bitmap)[None]), roi, torch.tensor([0]), 28)
    share = bitmap[4:60, 8:92].reshape(28, 2, 28, 3).mean(axis=(1, 3))
    assert (share == 0.5).any()
    assert np.array_equal(cut[0].numpy() == 1, share >= 0.5)


@FEW
@given(seed=seeds, objects=st.integers(1, 12))
def test_mask_targets_equal_roi_align_on_whole_bitmaps(seed: int, objects: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(4, 60, 2))
    bitmaps = np.zeros((objects, height, width), np.uint8)
    for bitmap in bitmaps:  # objects of very different sizes, some of them at the image's ends
        y1, x1 = rng.integers(0, [height, width])
        y2, x2 = rng.integers([y1, x1], [height, width]) + 1
        bitmap[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < 0.8
    count = 30
    corners = np.sort(rng.uniform(0, [[width], [height]], (count, 2, 2)), axis=2)
    rois = torch.from_numpy(corners.transpose(0, 2, 1).reshape(count, 4)).float()
    chosen = torch.from_numpy(rng.integers(0, objects, count))
    whole = torch.from_numpy(bitmaps)
    indexed = torch.cat((chosen[:, None].float(), rois), dim=1)
    theirs = roi_align(whole[:, None].float(), indexed, (28, 28), 1.0, -1, aligned=True)[:, 0]
    ours = mask_targets(target(whole), rois, chosen, 28)
    # where the mean is close to a half, adding a crop's place rounds it to the other side
    clear = (theirs - 0.5).abs() > 1e-5
    assert torch.equal(ours[clear], (theirs >= 0.5).float()[clear])
    assert clear.float().mean() > 0.5


def test_no_rois_have_no_mask_targets() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    for masks in (torch.zeros(0, 20, 20), torch.ones(2, 20, 20)):
        cut = mask_targets(target(masks.to(torch.uint8)), torch.zeros(0, 4), empty, 28)
        assert cut.shape == (0, 28, 28)


def test_box_code_equals_torchvisions() -> None:
    generator = torch.Generator().manual_seed(1)
    anchors, boxes = (random_boxes(generator, 500, 300, 200) for _ in range(2))
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    torch.testing.assert_close(encode_boxes(boxes, anchors), coder.encode_single(boxes, anchors))
    deltas = 2 * torch.randn(500, 4, generator=generator)
    deltas[:20, 2:] = 50  # beyond the clamp
    theirs = coder.decode_single(deltas, anchors)
    torch.testing.assert_close(decode_boxes(deltas, anchors), theirs, rtol=1e-5, atol=1e-3)
    assert torch.isfinite(theirs).all()


def test_decode_inverts_encode() -> None:
    generator = torch.Generator().manual_seed(2)
    anchors, boxes = (random_boxes(generator, 500, 300, 200) for _ in range(2))
    anchors[:, 2:] += 10  # no box is 62.5 times as long as its anchor, where decoding clamps
    back = decode_boxes(encode_boxes(boxes, anchors), anchors)
    torch.testing.assert_close(back, boxes, rtol=1e-5, atol=1e-3)


def test_clip_uses_each_images_own_size() -> None:
    boxes = torch.tensor([[-5.0, -6, 300, 400]]).expand(2, 1, 4)
    clipped = clip_boxes(boxes, torch.tensor([[100, 200], [80, 50]], dtype=torch.int32))
    assert clipped.tolist() == [[[0, 0, 200, 100]], [[0, 0, 50, 80]]]


def test_paired_iou_of_known_pairs() -> None:
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1], [3, 3, 3, 3]])
    b = torch.tensor([[1.0, 0, 3, 2], [0, 0, 2, 2], [2, 2, 3, 3], [3, 3, 3, 3]])
    torch.testing.assert_close(paired_iou(a, b), torch.tensor([1 / 3, 1, 0, 0]))
