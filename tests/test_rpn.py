"""Anchors, proposals and RPN losses against torchvision's Faster R-CNN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategies import cropped, random_boxes, tiny_config
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from comask.data.training_set import Target
from comask.models.rpn import (
    RPN,
    STRIDES,
    LevelOutput,
    base_anchors,
    level_anchors,
    proposals_from_levels,
)
from comask.training.losses import rpn_losses

SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)
RATIOS = (0.5, 1.0, 2.0)
SMALL = (12.0, 24.0, 48.0, 72.0, 96.0)


def their_rpn(top_n: int = 50, post: int = 10**6) -> RegionProposalNetwork:
    """Torchvision's, sampling every anchor."""
    generator = AnchorGenerator(tuple((s,) for s in SMALL), (RATIOS,) * 5)
    counts = [{"training": n, "testing": n} for n in (top_n, post)]
    return RegionProposalNetwork(
        generator, RPNHead(16, 3), 0.7, 0.3, 10**6, 0.5, *counts, nms_thresh=0.7
    ).eval()


def outputs(seed: int, height: int = 128, width: int = 192, batch: int = 2) -> list[LevelOutput]:
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for size, stride in zip(SMALL, STRIDES, strict=True):
        anchors = level_anchors(
            base_anchors(size, RATIOS), height // stride, width // stride, stride
        )
        logits = 3 * torch.randn(batch, len(anchors), generator=generator)
        deltas = 0.4 * torch.randn(batch, len(anchors), 4, generator=generator)
        levels.append(LevelOutput(logits, deltas, anchors))
    return levels


@pytest.mark.parametrize(("height", "width"), [(128, 192), (832, 1344)])
def test_anchors_equal_torchvisions(height: int, width: int) -> None:
    generator = AnchorGenerator(tuple((int(s),) for s in SIZES), (RATIOS,) * 5)
    maps = [torch.zeros(1, 1, height // s, width // s) for s in STRIDES]
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    ours = [
        level_anchors(base_anchors(size, RATIOS), *m.shape[2:], stride)
        for size, m, stride in zip(SIZES, maps, STRIDES, strict=True)
    ]
    assert torch.equal(torch.cat(ours), generator(images, maps)[0])


def test_rpn_orders_its_outputs_as_its_anchors() -> None:
    torch.manual_seed(0)
    rpn, head = RPN(16, SMALL, RATIOS), RPNHead(16, 3)
    head.load_state_dict(
        {
            f"{name}.{kind}": getattr(layer, kind)
            for name, layer in (
                ("conv.0.0", rpn.conv),
                ("cls_logits", rpn.objectness),
                ("bbox_pred", rpn.deltas),
            )
            for kind in ("weight", "bias")
        }
    )
    pyramid = [torch.randn(2, 16, 128 // s, 192 // s) for s in STRIDES]
    logits, deltas = head(pyramid)
    for i, level in enumerate(rpn(pyramid)):  # theirs: [B, A·c, H, W]
        assert torch.equal(level.anchors, outputs(0)[i].anchors)
        expected = logits[i].permute(0, 2, 3, 1).reshape(2, -1)
        torch.testing.assert_close(level.logits, expected)
        b, _, h, w = deltas[i].shape
        expected = deltas[i].view(b, 3, 4, h, w).permute(0, 3, 4, 1, 2).reshape(b, -1, 4)
        torch.testing.assert_close(level.deltas, expected)


@pytest.mark.parametrize("seed", range(4))
def test_proposals_equal_torchvisions(seed: int) -> None:
    levels, sizes = outputs(seed), [(100, 192), (128, 150)]
    ours, scores = proposals_from_levels(
        levels, torch.tensor(sizes), candidates_per_level=50, num_proposals=120, nms_iou=0.7
    )
    deltas = torch.cat([level.deltas for level in levels], dim=1)
    anchors = torch.cat([level.anchors for level in levels])
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    theirs, their_scores = their_rpn(50, 120).filter_proposals(
        coder.decode(deltas.flatten(0, 1), [anchors, anchors]).view_as(deltas),
        torch.cat([level.logits for level in levels], dim=1).flatten()[:, None],
        sizes,
        [len(level.anchors) for level in levels],
    )
    assert ours.shape == (2, 120, 4)
    for i in range(2):
        found = int((scores[i] > 0).sum())
        assert found == len(theirs[i]) > 50
        torch.testing.assert_close(ours[i, :found], theirs[i], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(scores[i, :found], their_scores[i])


def test_missing_proposals_are_zeros_at_the_end() -> None:
    levels = outputs(5, 64, 64, batch=1)
    boxes, scores = proposals_from_levels(
        levels, torch.tensor([[64, 64]]), candidates_per_level=100, num_proposals=500, nms_iou=0.1
    )
    found = int((scores > 0).sum())
    assert 0 < found < 500
    assert boxes.shape == (1, 500, 4)
    assert (scores[0].diff() <= 0).all()
    assert not boxes[0, found:].any()
    assert ((boxes[0, :found, 2:] - boxes[0, :found, :2]) >= 1e-3).all()


def one_anchor(logits: list[float], boxes: list[list[float]]) -> list[LevelOutput]:
    """Five levels with an anchor each and no deltas."""
    return [
        LevelOutput(torch.tensor([[logit]]), torch.zeros(1, 1, 4), torch.tensor([box]))
        for logit, box in zip(logits, boxes, strict=True)
    ]


def propose(levels: list[LevelOutput], count: int = 5) -> tuple[Tensor, Tensor]:
    boxes, scores = proposals_from_levels(
        levels, torch.tensor([[50, 50]]), candidates_per_level=1, num_proposals=count, nms_iou=0.7
    )
    return boxes[0], scores[0]


def test_saturated_probabilities_are_ranked_by_logit() -> None:
    logits = [30.0, 50.0, 20.0, 60.0, 40.0]
    boxes, scores = propose(one_anchor(logits, [[0.0, 0, 10 + i, 10 + i] for i in range(5)]))
    assert (scores == 1).all()
    assert boxes[:, 2].tolist() == [13, 11, 14, 10, 12]


def test_an_unlikely_proposal_is_no_padding() -> None:
    """Sigmoid of -200 is 0 in f32, and in ONNX Runtime already that of -18."""
    boxes, scores = propose(one_anchor([-18.0, -200.0], [[0.0, 0, 9, 9], [20.0, 0, 29, 9]]))
    assert (scores > 0).tolist() == [True, True]
    assert boxes.tolist() == [[0, 0, 9, 9], [20, 0, 29, 9]]


def test_levels_do_not_suppress_each_other() -> None:
    boxes, scores = propose(one_anchor([1.0, 2.0, 3.0, 4.0, 5.0], [[0.0, 0, 10, 10]] * 5))
    assert (scores > 0).all()
    assert (boxes == torch.tensor([0.0, 0, 10, 10])).all()


def test_boxes_thinner_than_a_thousandth_are_no_proposals() -> None:
    edges = [10.0, 10.0, 1.1e-3, 0.9e-3, 10.0]
    sound = one_anchor([1.0, 2.0, 3.0, 4.0, 5.0], [[0.0, 0, edge, 10] for edge in edges])
    sound[4] = sound[4]._replace(anchors=torch.tensor([[60.0, 0, 80, 10]]))  # off the image
    _, scores = propose(sound)
    torch.testing.assert_close(scores, torch.tensor([3.0, 2, 1, -torch.inf, -torch.inf]).sigmoid())


def test_anchors_in_a_crowd_teach_nothing() -> None:
    levels = outputs(9)
    logits = [level.logits.requires_grad_() for level in levels]
    crowd = torch.tensor([[0.0, 0, 60, 40]])
    target = Target(
        boxes=torch.zeros(0, 4),
        crowds=crowd,
        labels=torch.zeros(0, dtype=torch.int64),
        masks=cropped(torch.zeros(0, 1, 1, dtype=torch.uint8)),
        mask_scale=torch.ones(4),
    )
    config = replace(tiny_config(), rpn_samples=10**6)
    empty = replace(target, crowds=torch.zeros(0, 4))
    counts = []
    for first in (target, empty):
        targets = [first, empty]
        objectness, _ = rpn_losses(levels, targets, config, [t.generator() for t in targets])
        counts.append(int(objectness.items))
        gradients = torch.autograd.grad(objectness.total, logits, retain_graph=True)
        taught = torch.cat([gradient[0] for gradient in gradients]) != 0
        anchors = torch.cat([level.anchors for level in levels])
        low, high = (
            torch.maximum(anchors[:, :2], crowd[:, :2]),
            anchors[:, 2:].minimum(crowd[:, 2:]),
        )
        share = (high - low).clamp(min=0).prod(dim=1) / (anchors[:, 2:] - anchors[:, :2]).prod(
            dim=1
        )
        assert taught[share < 0.5].all()
        assert taught[share >= 0.5].any() == (first is empty)
    assert counts[0] < counts[1]


@pytest.mark.parametrize("objects", [6, 1, 0])
def test_losses_equal_torchvisions_when_every_anchor_is_sampled(objects: int) -> None:
    generator, levels = torch.Generator().manual_seed(8), outputs(9)
    truths = [random_boxes(generator, count, 80, 60) for count in (objects, objects // 2)]
    targets = [
        Target(
            boxes=boxes,
            crowds=torch.zeros(0, 4),
            labels=torch.zeros(len(boxes), dtype=torch.int64),
            masks=cropped(torch.zeros(len(boxes), 1, 1, dtype=torch.uint8)),
            mask_scale=torch.ones(4),
        )
        for boxes in truths
    ]
    config = replace(tiny_config(), rpn_samples=10**6, rpn_positive_fraction=0.5)
    terms = rpn_losses(levels, targets, config, [target.generator() for target in targets])
    ours = [total / count for total, count in terms]
    theirs = their_rpn()
    anchors = [torch.cat([level.anchors for level in levels])] * 2
    labels, matched = theirs.assign_targets_to_anchors(anchors, [{"boxes": b} for b in truths])
    expected = theirs.compute_loss(
        torch.cat([level.logits for level in levels], dim=1).flatten()[:, None],
        torch.cat([level.deltas for level in levels], dim=1).flatten(0, 1),
        labels,
        theirs.box_coder.encode(matched, anchors),
    )
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-5, atol=1e-6)
    assert (ours[1] > 0) == (objects > 0)
