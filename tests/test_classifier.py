"""The classification branch: size, choice of detections and training loss against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import FULL, parameter_count, random_boxes, rois_of, tiny_config, tiny_model
from torch import Tensor
from torch.nn import functional

from comask.config import CANDIDATES, ModelConfig
from comask.errors import ConfigError
from comask.models.classifier import (
    Chosen,
    Classifier,
    choose_detections,
    scores_are_numbers,
)
from comask.training.losses import assign_rois, classification_losses

Row = tuple[float, int, tuple[float, ...]]  # score, label, box


def overlap(a: Tensor, b: Tensor) -> float:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.tolist(), b.tolist()
    w, h = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    inter = max(w, 0.0) * max(h, 0.0)
    return inter / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter)


def reference(
    logits: Tensor, boxes: Tensor, proposal_scores: Tensor, threshold: float, iou: float, count: int
) -> list[Row]:
    """One image's detections, pair by pair."""
    exponent = np.exp(logits.double().numpy())
    probabilities = exponent / exponent.sum(axis=1, keepdims=True)
    pairs = [
        (-probabilities[n, k + 1], n, k)
        for n in range(len(boxes))
        for k in range(logits.shape[1] - 1)
        if probabilities[n, k + 1] > threshold and proposal_scores[n] > 0
    ]
    kept: list[tuple[float, int, int]] = []
    for score, n, k in sorted(pairs)[:1000]:
        same_class = [m for _, m, label in kept if label == k]
        if all(overlap(boxes[n], boxes[m]) <= iou for m in same_class):
            kept.append((score, n, k))
    return [(-score, k, tuple(boxes[n].tolist())) for score, n, k in kept[:count]]


def choose(
    logits: Tensor,
    boxes: Tensor,
    scores: Tensor,
    threshold: float = 0.05,
    iou: float = 0.3,
    count: int = 100,
) -> Chosen:
    return choose_detections(
        logits, boxes, scores, score_threshold=threshold, nms_iou=iou, num_detections=count
    )


def test_parameter_count_is_that_of_the_design() -> None:
    with torch.device("meta"):
        module = Classifier(ModelConfig())
    layers = (256 * 49 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 81
    assert parameter_count(module) == layers == 13_978_705


def test_classifier_is_three_layers_with_two_relus() -> None:
    torch.manual_seed(0)
    config = ModelConfig(channels=4, norm_groups=4, classifier_width=12, num_classes=5)
    module, x = Classifier(config), torch.randn(3, 4, 7, 7)
    hidden = x.reshape(3, 4 * 49)
    for layer in (module.fc1, module.fc2):
        hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
    expected = functional.linear(hidden, module.logits.weight, module.logits.bias)
    assert expected.shape == (3, 6)
    torch.testing.assert_close(module(x)[0], expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("proposals", "threshold", "count"),
    [(60, 0.05, 100), (60, 0.15, 10), (400, 0.0, 100), (400, 0.05, 1000)],
)
def test_choice_equals_the_loop(seed: int, proposals: int, threshold: float, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.stack([random_boxes(generator, proposals, 30, 40) for _ in range(2)])
    logits = 2 * torch.randn(2, proposals, 9, generator=generator)
    scores = (torch.rand(2, proposals, generator=generator) > 0.2).float()
    chosen = choose(logits, boxes, scores, threshold, count=count)
    assert chosen.boxes.shape == (2, count, 4)
    assert (chosen.found.dtype, chosen.labels.dtype) == (torch.int32, torch.int64)
    for i in range(2):
        rows = reference(logits[i], boxes[i], scores[i], threshold, 0.3, count)
        found = len(rows)
        assert chosen.found[i] == found > 0
        assert chosen.labels[i, :found].tolist() == [label for _, label, _ in rows]
        assert chosen.boxes[i, :found].tolist() == [list(box) for *_, box in rows]
        expected = torch.tensor([score for score, *_ in rows], dtype=torch.float32)
        torch.testing.assert_close(chosen.scores[i, :found], expected)
        for padding in (chosen.boxes, chosen.scores, chosen.labels):
            assert not padding[i, found:].any()


def test_padding_proposals_never_win() -> None:
    logits = torch.zeros(1, 2, 3)
    logits[0, 1, 1] = 20.0  # the padding is sure of itself
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 0, 0]]])
    chosen = choose(logits, boxes, torch.tensor([[0.5, 0.0]]))
    assert chosen.found.tolist() == [2]  # both classes of the sound one
    assert chosen.boxes[0, :2].tolist() == [[0, 0, 9, 9]] * 2
    assert chosen.scores.max() < 0.34


def test_ties_go_to_the_lower_proposal_and_class() -> None:
    boxes = 20.0 * torch.arange(4)[:, None] + torch.tensor([0.0, 0, 9, 9])
    chosen = choose(torch.zeros(1, 4, 4), boxes[None], torch.ones(1, 4), count=7)
    assert chosen.labels[0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert chosen.boxes[0, :, 0].tolist() == [0, 0, 0, 20, 20, 20, 40]


def test_a_background_proposal_is_no_detection() -> None:
    logits = torch.tensor([[[9.0, 0, 0], [8, 0, 0]]])
    boxes = torch.tensor([[[0.0, 0, 9, 9], [20, 20, 29, 29]]])
    chosen = choose(logits, boxes, torch.ones(1, 2), count=6)
    assert chosen.found.tolist() == [0]
    assert chosen.boxes.shape == (1, 6, 4)
    assert not torch.cat((chosen.boxes.flatten(), chosen.scores.flatten())).any()
    assert not chosen.labels.any()


def test_one_proposal_can_win_two_classes() -> None:
    logits = torch.tensor([[[0.0, 5, 4]]])
    chosen = choose(logits, torch.tensor([[[1.0, 2, 3, 4]]]), torch.ones(1, 1), count=3)
    assert chosen.found.tolist() == [2]
    assert chosen.labels[0, :2].tolist() == [0, 1]
    assert chosen.boxes[0].tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 0, 0]]


def test_a_score_of_exactly_the_threshold_is_too_low() -> None:
    logits = torch.zeros(1, 1, 4)  # a quarter each
    boxes = torch.tensor([[[0.0, 0, 9, 9]]])
    assert choose(logits, boxes, torch.ones(1, 1), threshold=0.25).found.tolist() == [0]
    assert choose(logits, boxes, torch.ones(1, 1), threshold=0.2499).found.tolist() == [3]


def test_more_detections_than_candidates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.detections: expected 1 to 1000"):
        tiny_config(detections=CANDIDATES + 1)


def test_assigned_rois_hold_the_objects_themselves() -> None:
    config = tiny_config(roi_samples=64, roi_positive_fraction=0.5)
    proposals = torch.tensor([[12.0, 10, 60, 52], [90, 0, 110, 12], [10, 10, 36, 50]])
    positive, objects, negative = assign_rois(proposals, FULL, config)
    rows = {(*box, i) for box, i in zip(positive.tolist(), objects.tolist(), strict=True)}
    found = {(*box, i) for i, box in enumerate(FULL.boxes.tolist())}
    assert rows == found | {(12.0, 10, 60, 52, 0), (10.0, 10, 36, 50, 0)}
    assert negative.tolist() == [[90, 0, 110, 12]]


def test_classification_loss_pairs_each_roi_with_its_class() -> None:
    model = tiny_model()
    pyramid, rois, targets = rois_of(model)
    losses = []
    for i, ((positive, objects, negative), truth) in enumerate(zip(rois, targets, strict=True)):
        maps = [level[i : i + 1] for level in pyramid]
        classes = [int(truth.labels[o]) + 1 for o in objects] + [0] * len(negative)
        for roi, label in zip(torch.cat((positive, negative)), classes, strict=True):
            logits = model.classifier(model.pool(maps, roi[None, None], 7))[0][0]
            losses.append(-(logits.softmax(0)[label]).log())
    expected = torch.stack(losses).mean()
    (total, count), regression = classification_losses(model, pyramid, rois, targets)
    torch.testing.assert_close(total / count, expected)
    assert regression is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_whose_scores_are_no_numbers_is_told_from_the_others(
    dtype: torch.dtype, value: float
) -> None:
    logits, scores = torch.zeros(3, 5, 4, dtype=dtype), torch.zeros(3, 5)
    logits[0] = torch.finfo(dtype).max  # large, but a number
    logits[1, 4, 2] = value
    if value < 0:  # a score is a sigmoid
        scores[2, 0] = float("nan")
    assert scores_are_numbers(logits, scores).tolist() == [True, False, value > 0 or value != value]
