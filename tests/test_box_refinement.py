"""The collaborative head: its size, and equations 8 and 9 against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from paper_form import class_masks
from strategies import FEW, arrays, boxes, parameter_count, seeds
from torch import Tensor

from comask.config import ModelConfig
from comask.models.box_refinement import (
    ClassConv2d,
    CollaborativeHead,
    average_box,
    cell_confidence,
    cell_weights,
    decode_cells,
)


def head(channels: int = 16, convs: int = 2, **others: Any) -> CollaborativeHead:
    torch.manual_seed(1)
    config = ModelConfig(
        num_classes=8, channels=channels, head_channels=channels, head_convs=convs, norm_groups=4,
        **others,
    )  # fmt: skip
    return CollaborativeHead(config)


def places(roi: Tensor) -> list[tuple[int, int, Tensor, Tensor]]:
    """(row, column, x, y) of the 49 cells."""
    x1, y1, x2, y2 = roi
    return [
        (i, j, x1 + (x2 - x1) * (j + 0.5) / 7, y1 + (y2 - y1) * (i + 0.5) / 7)
        for i in range(7)
        for j in range(7)
    ]


def perfect_offsets(rois: Tensor, truth: Tensor) -> Tensor:
    """What each cell must say for its box to be the object's, in f64 and then f32."""
    offsets = torch.zeros(len(rois), 4, 7, 7)
    for r, (roi, goal) in enumerate(zip(rois.double(), truth.double(), strict=True)):
        w, h = roi[2] - roi[0], roi[3] - roi[1]
        for i, j, x, y in places(roi):
            left, right, top, bottom = x - goal[0], goal[2] - x, y - goal[1], goal[3] - y
            offsets[r, :, i, j] = torch.stack((left / w, right / w, top / h, bottom / h))
    return offsets


def test_parameter_count_is_that_of_the_design() -> None:
    with torch.device("meta"):
        module = CollaborativeHead(ModelConfig())
    convs = 10 * (256 * 256 * 9 + 512)
    deconvs = 2 * (256 * 256 * 4 + 256 + 512)
    masks, offsets = 256 * 81 * 9 + 81, 256 * 4 * 9 + 4 * 7 * 7  # a bias for each cell
    assert parameter_count(module) == convs + deconvs + masks + offsets
    assert round(parameter_count(module) / 1e6, 2) == 6.63


@pytest.mark.parametrize("count", [3, 0])
def test_output_shapes(count: int) -> None:
    labels = torch.zeros(count, dtype=torch.long)
    masks, offsets, _ = head()(torch.randn(count, 16, 14, 14), labels)
    assert masks.shape == (count, 28, 28)
    assert offsets.shape == (count, 4, 7, 7)


def test_offsets_start_at_the_roi_and_are_never_negative() -> None:
    module, x = head(), torch.randn(4, 16, 14, 14)
    offsets = module(x, torch.zeros(len(x), dtype=torch.long)).offsets
    rois = torch.tensor([[10.0, 20, 80, 60]]).expand(4, 4)
    start = decode_cells(offsets, rois)
    assert (start - rois[:, None, None]).abs().max() < 70 * 0.1
    torch.nn.init.zeros_(module.offsets.weight)
    exact = decode_cells(module(x, torch.zeros(len(x), dtype=torch.long))[1], rois)
    torch.testing.assert_close(exact, rois[:, None, None].expand(4, 7, 7, 4))
    torch.nn.init.normal_(module.offsets.weight, std=1.0)
    offsets = module(x, torch.zeros(len(x), dtype=torch.long)).offsets
    assert (offsets == 0).any()
    assert (offsets >= 0).all()


@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_a_head_computes_the_mask_of_the_class_alone(kernel: int) -> None:
    """The mask equals that of the paper's head, which computes those of all classes."""
    torch.manual_seed(1)
    module = head(mask_kernel=kernel)
    torch.nn.init.normal_(module.mask.bias)
    pooled, labels = torch.randn(5, 16, 14, 14), torch.tensor([0, 7, 3, 3, 1])
    expected = class_masks(module, pooled)[torch.arange(5), labels + 1]
    masks = module(pooled, labels).masks
    assert masks.shape == (5, 28, 28)
    assert masks.dtype == torch.float32
    torch.testing.assert_close(masks, expected, atol=2e-6 * float(expected.abs().max()), rtol=0)


def test_gradients_of_the_class_mask_are_those_of_the_convolution() -> None:
    torch.manual_seed(2)
    ours = ClassConv2d(6, 4, 3, padding=1).double()
    x = torch.randn(5, 6, 7, 9, dtype=torch.float64, requires_grad=True)
    channels = torch.tensor([1, 3, 3, 0, 2])
    weights = torch.randn(5, 7, 9, dtype=torch.float64)
    whole = torch.nn.functional.conv2d(x, ours.weight, ours.bias, padding=1)
    expected = torch.autograd.grad(
        (whole[torch.arange(5), channels] * weights).sum(), (x, ours.weight, ours.bias)
    )
    found = torch.autograd.grad((ours(x, channels) * weights).sum(), (x, ours.weight, ours.bias))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_cells_decode_as_their_formula_reads() -> None:
    torch.manual_seed(2)
    rois = torch.tensor([[10.0, 20, 80, 50], [0, 0, 7, 14]])
    offsets = torch.rand(2, 4, 7, 7)
    decoded = decode_cells(offsets, rois)
    assert decoded.shape == (2, 7, 7, 4)
    for r, roi in enumerate(rois):
        w, h = roi[2] - roi[0], roi[3] - roi[1]
        for i, j, x, y in places(roi):
            left, right, top, bottom = offsets[r, :, i, j]
            box = torch.stack((x - left * w, y - top * h, x + right * w, y + bottom * h))
            torch.testing.assert_close(decoded[r, i, j], box)


@FEW
@given(rois=boxes(2), truth=boxes(2), weights=arrays(2, 7, 7, low=2**-15))
def test_perfect_offsets_give_the_object_for_any_positive_weights(
    rois: Tensor, truth: Tensor, weights: Tensor
) -> None:
    cells = decode_cells(perfect_offsets(rois, truth), rois)
    averaged = average_box(cells, weights, rois)
    torch.testing.assert_close(averaged, truth, rtol=1e-5, atol=5e-3)


@FEW
@given(confidence=arrays(2, 7, 7), seed=seeds)
def test_average_is_that_of_equations_8_and_9(confidence: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cells = 100 * torch.rand(2, 7, 7, 4, generator=generator)
    rois = torch.full((2, 4), -1.0)
    averaged = average_box(cells, cell_weights(confidence, 0.5), rois)
    for r in range(2):
        passing = [(i, j) for i in range(7) for j in range(7) if confidence[r, i, j] > 0.5]
        voters = passing or [(i, j) for i in range(7) for j in range(7)]
        total = sum(confidence[r, i, j].item() for i, j in voters)
        if total > 1e-6:
            sums = sum(cells[r, i, j].double() * confidence[r, i, j].item() for i, j in voters)
            torch.testing.assert_close(averaged[r].double(), sums / total, rtol=1e-5, atol=1e-4)


@FEW
@given(confidence=arrays(1, 7, 7), seed=seeds)
def test_boxes_of_background_cells_do_not_matter(confidence: Tensor, seed: int) -> None:
    confidence[0, 3, 3] = 0.9
    generator = torch.Generator().manual_seed(seed)
    cells = 100 * torch.rand(1, 7, 7, 4, generator=generator)
    weights = cell_weights(confidence, 0.5)
    background = torch.where(confidence <= 0.5)
    order = torch.randperm(len(background[0]), generator=generator)
    shuffled = cells.clone()
    shuffled[background] = cells[background][order]
    rois = torch.zeros(1, 4)
    assert torch.equal(average_box(cells, weights, rois), average_box(shuffled, weights, rois))


def test_foreground_cells_alone_vote() -> None:
    confidence = torch.full((1, 7, 7), 0.5)  # not above the threshold
    confidence[0, 1, 2], confidence[0, 5, 6] = 0.6, 0.9
    expected = torch.zeros(1, 7, 7)
    expected[0, 1, 2], expected[0, 5, 6] = 0.6, 0.9
    assert torch.equal(cell_weights(confidence, 0.5), expected)


def test_without_foreground_all_cells_vote_by_confidence() -> None:
    torch.manual_seed(3)
    confidence, cells = 0.5 * torch.rand(1, 7, 7), 100 * torch.rand(1, 7, 7, 4)
    averaged = average_box(cells, cell_weights(confidence, 0.5), torch.zeros(1, 4))
    expected = torch.einsum("rij,rijc->rc", confidence, cells) / confidence.sum()
    assert torch.isfinite(averaged).all()
    torch.testing.assert_close(averaged, expected)


def test_fallback_is_decided_for_each_roi_alone() -> None:
    confidence = torch.full((2, 7, 7), 0.25)
    confidence[1, 0, 0] = 0.75
    weights = cell_weights(confidence, 0.5)
    assert (weights[0] == 0.25).all()
    assert weights[1].count_nonzero() == 1


def test_without_any_weight_the_proposal_stays() -> None:
    rois = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    weights = torch.zeros(2, 7, 7)
    weights[1, 0, 0] = 1.0
    cells = torch.full((2, 7, 7, 4), 9.0)
    averaged = average_box(cells, weights, rois)
    assert averaged.tolist() == [[1, 2, 3, 4], [9, 9, 9, 9]]


@FEW
@given(confidence=arrays(2, 7, 7))
def test_threshold_0_counts_every_cell(confidence: Tensor) -> None:
    assert torch.equal(cell_weights(confidence, 0.0), confidence)


def test_confidence_is_the_mean_of_probabilities_not_of_logits() -> None:
    torch.manual_seed(4)
    logits = 8 * torch.randn(2, 28, 28)
    blocks = logits.double().reshape(2, 7, 4, 7, 4)
    expected = (1 / (1 + torch.exp(-blocks))).mean(dim=(2, 4))
    confidence = cell_confidence(logits)
    torch.testing.assert_close(confidence.double(), expected, rtol=1e-5, atol=1e-6)
    other_order = torch.sigmoid(blocks.mean(dim=(2, 4)))
    assert (confidence - other_order).abs().max() > 0.1
