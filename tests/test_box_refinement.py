"""The collaborative head: its size, and equations 8 and 9 against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import FEW, arrays, boxes, parameter_count, seeds
from torch import Tensor

from comask.config import ModelConfig
from comask.models.box_refinement import (
    CollaborativeHead,
    average_box,
    cell_confidence,
    cell_weights,
    decode_cells,
    select_class,
)


def head(channels: int = 16, convs: int = 2) -> CollaborativeHead:
    torch.manual_seed(1)
    config = ModelConfig(
        num_classes=8, channels=channels, head_channels=channels, head_convs=convs, norm_groups=4
    )
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
    masks, offsets = head()(torch.randn(count, 16, 14, 14))
    assert masks.shape == (count, 9, 28, 28)
    assert offsets.shape == (count, 4, 7, 7)


def test_offsets_start_at_the_roi_and_are_never_negative() -> None:
    module, x = head(), torch.randn(4, 16, 14, 14)
    _, offsets = module(x)
    rois = torch.tensor([[10.0, 20, 80, 60]]).expand(4, 4)
    start = decode_cells(offsets, rois)
    assert (start - rois[:, None, None]).abs().max() < 70 * 0.1
    torch.nn.init.zeros_(module.offsets.weight)
    exact = decode_cells(module(x)[1], rois)
    torch.testing.assert_close(exact, rois[:, None, None].expand(4, 7, 7, 4))
    torch.nn.init.normal_(module.offsets.weight, std=1.0)
    _, offsets = module(x)
    assert (offsets == 0).any()
    assert (offsets >= 0).all()


def test_select_class_skips_the_background_channel() -> None:
    logits = torch.arange(9.0)[None, :, None, None].expand(3, 9, 28, 28)
    chosen = select_class(logits, torch.tensor([0, 7, 3]))
    assert chosen.shape == (3, 28, 28)
    assert chosen[:, 0, 0].tolist() == [1, 8, 4]


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
