"""The losses against plain loops, and that every parameter learns whatever the batch holds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from paper_form import class_masks
from strategies import (
    EMPTY,
    FULL,
    ONE,
    SIZES,
    noise_images,
    random_boxes,
    rois_of,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from torch.nn import functional

from comask.config import ModelConfig
from comask.data.training_set import Target
from comask.models.box_refinement import CollaborativeHead, decode_cells
from comask.models.boxes import clip_boxes
from comask.models.comask import CoMask
from comask.presets import preset
from comask.training.losses import Objective, Rois, dense_box_loss, head_losses
from comask.training.targets import jitter, mask_targets

BATCHES = {"objects": [FULL, ONE], "one image empty": [EMPTY, ONE], "none": [EMPTY, EMPTY]}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("refined", [False, True])
def test_losses_are_finite_and_reach_every_parameter(name: str, refined: bool) -> None:
    torch.manual_seed(0)
    model = tiny_model(train_refined_masks=refined, rpn_samples=10_000)  # every anchor
    losses = Objective(model.train())(noise_images(2, 96, 128), SIZES, BATCHES[name])
    assert list(losses) == ["rpn_objectness", "rpn_box", "class", "mask", "box"]
    assert all(value.shape == () and torch.isfinite(value) for value in losses.values())
    for key in ("rpn_box", "mask", "box"):
        assert (losses[key] > 0) == (name != "none")
    sum(losses.values()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert [key for key, g in gradients.items() if g is None] == []
    assert all(torch.isfinite(g).all() for g in gradients.values())
    if name != "none":
        learning = ("head.", "classifier.", "rpn.", "mfpn.")
        assert [k for k, g in gradients.items() if k.startswith(learning) and not g.any()] == []


def mean_box_loss(cells: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    total, count = dense_box_loss(cells, truth, weights)
    return total / count.clamp(min=1.0)


def test_weights_of_the_configuration_scale_the_losses() -> None:
    names = ("rpn_objectness", "rpn_box", "class", "mask", "box")
    results = []
    for factors in ([1.0] * 5, [2.0, 3.0, 5.0, 7.0, 11.0]):
        changes = {f"{name}_weight": f for name, f in zip(names, factors, strict=True)}
        torch.manual_seed(1)
        losses = Objective(tiny_model(**changes))(noise_images(2, 96, 128), SIZES, [FULL, ONE])
        results.append(torch.stack([losses[name] for name in names]))
    torch.testing.assert_close(results[1] / results[0], torch.tensor([2.0, 3, 5, 7, 11]))


def iou_loss(cell: list[float], goal: list[float]) -> float:
    w = max(0.0, min(cell[2], goal[2]) - max(cell[0], goal[0]))
    h = max(0.0, min(cell[3], goal[3]) - max(cell[1], goal[1]))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (cell, goal)]
    iou = w * h / (sum(areas) - w * h)
    return -math.log(iou + 0.1 if iou <= 0.1 else iou)


@pytest.mark.parametrize("binary", [True, False])
def test_dense_box_loss_is_the_weighted_mean_over_cells(binary: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    cells = random_boxes(generator, 5 * 49, 30, 60).reshape(5, 7, 7, 4)
    truth = random_boxes(generator, 5, 30, 60)
    weights = torch.rand(5, 7, 7, generator=generator)
    weights = (weights > 0.6).float() if binary else weights
    total = sum(
        weights[r, i, j].item() * iou_loss(cells[r, i, j].tolist(), truth[r].tolist())
        for r in range(5)
        for i in range(7)
        for j in range(7)
    )
    actual = mean_box_loss(cells, truth, weights).item()
    assert actual == pytest.approx(total / weights.sum().item(), rel=1e-5)


def test_a_cell_of_weight_0_has_no_influence() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    cells = truth[:, None, None].expand(2, 7, 7, 4).clone()
    cells[0, 2, 3] = torch.tensor([500.0, 500, 900, 900])
    cells.requires_grad_()
    weights = torch.ones(2, 7, 7)
    assert mean_box_loss(cells, truth, weights) > 0.02
    weights[0, 2, 3] = 0
    loss = mean_box_loss(cells, truth, weights)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, cells)
    assert not gradient[0, 2, 3].any()
    assert mean_box_loss(cells, truth, torch.zeros(2, 7, 7)).item() == 0


@pytest.mark.parametrize("side", [1.0, 2.5, 3.1, 3.2, 9.0])  # of 10: IoU 0.01 to 0.81
def test_small_overlaps_keep_a_bounded_loss_and_a_gradient(side: float) -> None:
    truth = torch.tensor([[0.0, 0, 10, 10]])
    cells = torch.tensor([0.0, 0, side, side]).expand(1, 7, 7, 4).clone().requires_grad_()
    loss = mean_box_loss(cells, truth, torch.ones(1, 7, 7))
    iou = side * side / 100
    assert loss.item() == pytest.approx(-math.log(iou + 0.1 * (iou <= 0.1)), rel=1e-4)
    assert loss <= -math.log(0.1)
    (gradient,) = torch.autograd.grad(loss, cells)
    assert torch.isfinite(gradient).all()
    assert (gradient[..., 2:] < 0).all()  # a larger box is better


def test_disjoint_and_empty_cells_have_a_finite_gradient() -> None:
    cells = torch.tensor([[50.0, 50, 60, 60], [5, 5, 5, 5], [3, 3, 3, 8]])
    cells = cells.repeat(17, 1)[:49].reshape(1, 7, 7, 4).requires_grad_()
    loss = mean_box_loss(cells, torch.tensor([[0.0, 0, 10, 10]]), torch.ones(1, 7, 7))
    assert loss.item() == pytest.approx(-math.log(0.1))
    (gradient,) = torch.autograd.grad(loss, cells)
    assert torch.isfinite(gradient).all()


def test_iou_loss_has_a_gradient_for_every_cell_at_initialisation() -> None:
    torch.manual_seed(3)
    truth = torch.tensor([[20.0, 20, 90, 60]]).expand(8, 4)
    rois = jitter(truth, 0.15, 200, 200)
    config = ModelConfig(num_classes=4, channels=16, head_channels=16, head_convs=2, norm_groups=4)
    head = CollaborativeHead(config)
    offsets = head(torch.randn(8, 16, 14, 14), torch.zeros(8, dtype=torch.long)).offsets
    offsets.retain_grad()
    mean_box_loss(decode_cells(offsets, rois), truth, torch.ones(8, 7, 7)).backward()
    assert (offsets.grad.abs().sum(dim=1) > 0).all()
    assert head.offsets.weight.grad.abs().sum() > 0
    assert all(p.grad.any() for p in head.refine.parameters())


def by_hand(
    model: CoMask, pyramid: list[Tensor], rois: list[Rois], targets: list[Target]
) -> tuple[float, float, float]:
    """Coarse mask loss, box loss and the refined boxes' mask loss, RoI by RoI."""
    coarse, fine, box_losses = [], [], []
    for i, ((positive, objects, _), truth) in enumerate(zip(rois, targets, strict=True)):
        maps = [level[i : i + 1] for level in pyramid]
        for roi, place in zip(positive, objects, strict=True):
            channel = int(truth.labels[place]) + 1
            pooled = model.pool(maps, roi[None, None], 14)
            logits = class_masks(model.head, pooled)
            offsets = model.head(pooled, truth.labels[place][None]).offsets
            wanted = mask_targets(truth, roi[None], place[None], 28)[0]
            coarse.append(
                (functional.softplus(logits[0, channel]) - logits[0, channel] * wanted).mean()
            )
            cells = decode_cells(offsets, roi[None])[0]
            foreground = wanted.reshape(7, 4, 7, 4).mean(dim=(1, 3)) > 0.5
            if model.config.collaboration == "uniform":
                foreground[:] = True
            goal = truth.boxes[place].tolist()
            box_losses += [iou_loss(cell, goal) for cell in cells[foreground].tolist()]

            confidence = logits[0, channel].sigmoid().reshape(7, 4, 7, 4).mean(dim=(1, 3))
            weights = torch.where(confidence > 0.5, confidence, 0.0)
            weights = weights if weights.any() else confidence
            if model.config.collaboration == "uniform":
                weights = torch.ones_like(weights)
            box = torch.einsum("rc,rck->k", weights, cells) / weights.sum()
            box = clip_boxes(box[None, None], SIZES[i : i + 1])
            wanted = mask_targets(truth, box[0], place[None], 28)[0]
            again = class_masks(model.head, model.pool(maps, box, 14))[0, channel]
            fine.append((functional.softplus(again) - again * wanted).mean())
    mean_box = sum(box_losses) / len(box_losses)
    return torch.stack(coarse).mean().item(), mean_box, torch.stack(fine).mean().item()


@pytest.mark.parametrize("collaboration", ["weighted", "uniform"])
@pytest.mark.parametrize("refined", [False, True])
@torch.no_grad()
def test_head_losses_equal_the_loop(refined: bool, collaboration: str) -> None:
    model = tiny_model(roi_jitter=0.0, train_refined_masks=refined, collaboration=collaboration)
    pyramid, rois, targets = rois_of(model)
    terms = head_losses(model, pyramid, SIZES, rois, targets, [t.generator() for t in targets])
    mask, box = (terms[name].total / terms[name].items for name in ("mask", "box"))
    coarse, box_by_hand, fine = by_hand(model, pyramid, rois, targets)
    assert box.item() == pytest.approx(box_by_hand, rel=1e-5)
    # with both passes, the mean of both: a sum would double the weight of masks against boxes
    assert mask.item() == pytest.approx((coarse + fine) / 2 if refined else coarse, rel=1e-5)


@pytest.mark.parametrize(("limit", "expected"), [(2, 3), (100, 5)])  # of 4 and 1 positives
def test_at_most_head_rois_of_an_image_train_the_head(limit: int, expected: int) -> None:
    model = tiny_model(head_rois=limit)
    pyramid, rois, targets = rois_of(model)
    seen: list[int] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    head_losses(model, pyramid, SIZES, rois, targets, [t.generator() for t in targets])
    assert seen == [expected]


def test_an_image_draws_the_same_samples_in_any_batch() -> None:
    """Losses are sums over images, so sums of parts are the whole, whatever the global RNG does."""
    model = tiny_model(rpn_samples=40, roi_samples=16, head_rois=2)
    images = noise_images(2, 96, 128)
    targets = [replace(FULL, seed=5), replace(ONE, seed=9)]
    parts = [([0, 1], 1.0), ([1, 0], 1.0), ([0], 1.0), ([1], 1.0)]
    results = []
    for places, _ in parts:
        torch.rand(3)
        terms = every_term(model, images[places], SIZES[places], [targets[i] for i in places])
        results.append(terms)
    whole, swapped, first, second = results
    torch.testing.assert_close(whole, swapped)
    torch.testing.assert_close(whole, first + second)


def every_term(model: CoMask, images: Tensor, sizes: Tensor, targets: list[Target]) -> Tensor:
    """Sums and counts [5, 2] of an `Objective`, before it divides them."""
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "comask.training.losses.mean_over_ranks", lambda counts: seen.append(counts) or counts
        )
        losses = Objective(model)(images, sizes, targets)
    weights = [getattr(model.config, f"{name}_weight") for name in losses]
    sums = (
        torch.stack(list(losses.values()))
        / torch.tensor(weights)
        * torch.where(seen[0] > 0, seen[0], 1.0)
    )
    return torch.stack((sums, seen[0]), dim=1).detach()


def test_fc_reg_learns_boxes_in_the_classifier() -> None:
    config = tiny_config(collaboration="fc_reg")
    model = CoMask(config, preset("shapes-tiny").preprocess).train()
    losses = Objective(model)(noise_images(2, 96, 128), SIZES, [FULL, ONE])
    assert losses["box"] > 0
    (gradient,) = torch.autograd.grad(losses["box"], [model.classifier.deltas.weight])
    assert gradient.any()
    assert not hasattr(model.head, "offsets")


OPTIONS = {
    "backbone_norm": "group", "msfem_place": "replace", "residual_attention": True,
    "mask_kernel": 1, "collaboration": "fc_reg", "offset_activation": "exp",
    "cell_pooling": "logit", "empty_foreground": "proposal", "cell_targets": "soft",
    "box_loss": "giou", "refined_nms_iou": 0.5, "agreement_score": True, "second_boxes": True,
    "mask_scoring": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name, value in OPTIONS.items()),
        {"offset_activation": "none"},
        {"cell_pooling": "bilinear"},
        {"cell_targets": "pred"},
        {"train_refined_masks": True, "separate_fine_head": True},
        {"train_refined_masks": True, "separate_fine_head": True, "mask_scoring": True},
    ],
    ids=str,
)
def test_every_option_trains_all_of_its_parameters_and_predicts(changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = CoMask(tiny_config(**changes), preset("shapes-tiny").preprocess).train()
    losses = Objective(model)(noise_images(2, 96, 128), SIZES, [EMPTY, ONE])
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        features = model.stage1(noise_images(2, 96, 128), SIZES)
        found = model.stage2(**features, image_sizes=SIZES, diagnostics=True)
    assert found["num_detections"].sum() > 0
    for i, count in enumerate(found["num_detections"].tolist()):
        assert (found["scores"][i, :count] > 0).all()
        assert not found["scores"][i, count:].any()
        assert not found["boxes"][i, count:].any()
    assert all(torch.isfinite(value).all() for value in found.values())
