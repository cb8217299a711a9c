"""The whole network: what its stages return, batches, padding, collaboration and presets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paper_form import class_masks
from strategies import noise_images, parameter_count, tiny_model
from torch import Tensor

from comask.models.box_refinement import POOL_SIZE, decode_cells
from comask.models.boxes import clip_boxes
from comask.models.comask import DIAGNOSTIC_OUTPUTS, STAGE1_OUTPUTS, STAGE2_OUTPUTS, CoMask
from comask.presets import PRESETS

HEIGHT, WIDTH = 96, 128
SIZES = torch.tensor([[90, 100], [64, 128]], dtype=torch.int32)
Outputs = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> CoMask:
    return tiny_model()


@torch.no_grad()
def run(
    model: CoMask, images: Tensor, sizes: Tensor, *, diagnostics: bool = False
) -> tuple[Outputs, Outputs]:
    first = model.stage1(images, sizes)
    return first, model.stage2(**first, image_sizes=sizes, diagnostics=diagnostics)


@pytest.fixture(scope="module")
def outputs(model: CoMask) -> tuple[Outputs, Outputs]:
    return run(model, noise_images(2, HEIGHT, WIDTH), SIZES, diagnostics=True)


def assert_inside(boxes: Tensor, sizes: Tensor) -> None:
    for image, (height, width) in zip(boxes, sizes.tolist(), strict=True):
        assert (image >= 0).all()
        assert (image[:, 0::2] <= width).all()
        assert (image[:, 1::2] <= height).all()
        assert (image[:, 2:] >= image[:, :2]).all()


def test_stage1_keeps_its_contract(model: CoMask, outputs: tuple[Outputs, Outputs]) -> None:
    first, _ = outputs
    assert tuple(first) == STAGE1_OUTPUTS
    assert all(value.dtype == torch.float32 for value in first.values())
    for name, stride in (("p2", 4), ("p3", 8), ("p4", 16), ("p5", 32)):
        channels = model.config.channels
        assert first[name].shape == (2, channels, HEIGHT // stride, WIDTH // stride)
    boxes, scores = first["proposals"], first["proposal_scores"]
    assert (boxes.shape, scores.shape) == ((2, 40, 4), (2, 40))
    assert (scores.diff(dim=1) <= 0).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (scores > 0).sum(1).min() > 20
    assert not boxes[scores == 0].any()
    assert_inside(boxes, SIZES)


def test_stage2_keeps_its_contract(model: CoMask, outputs: tuple[Outputs, Outputs]) -> None:
    second = {name: outputs[1][name] for name in STAGE2_OUTPUTS}
    count, boxes, scores, labels, masks = second.values()
    d = model.config.detections
    assert [tuple(v.shape) for v in second.values()] == [
        *((2,), (2, d, 4), (2, d), (2, d), (2, d, 28, 28))
    ]
    assert [v.dtype for v in second.values()] == [
        *(torch.int32, torch.float32, torch.float32, torch.int32, torch.float32)
    ]
    assert (count >= 1).all()
    assert torch.equal(count, (scores > 0).sum(1))
    assert (scores.diff(dim=1) <= 0).all()
    assert ((labels >= 0) & (labels < model.config.num_classes)).all()
    assert ((masks >= 0) & (masks <= 1)).all()
    assert_inside(boxes, SIZES)


def test_padding_rows_are_zeros(outputs: tuple[Outputs, Outputs]) -> None:
    strict = tiny_model(score_threshold=outputs[1]["scores"][0, 8].item())
    _, second = run(strict, noise_images(2, HEIGHT, WIDTH), SIZES)
    assert second["num_detections"][0] == 8
    for i, found in enumerate(second["num_detections"].tolist()):
        for name in ("boxes", "scores", "labels", "masks"):
            assert not second[name][i, found:].any()
        assert (second["masks"][i, :found] > 0).all()


def test_no_detections_at_all() -> None:
    _, second = run(tiny_model(score_threshold=0.9999), noise_images(2, HEIGHT, WIDTH), SIZES)
    assert not any(value.any() for value in second.values())


def test_a_batch_equals_its_images_alone(model: CoMask, outputs: tuple[Outputs, Outputs]) -> None:
    images = noise_images(2, HEIGHT, WIDTH)
    for i in range(2):
        _, single = run(model, images[i : i + 1], SIZES[i : i + 1])
        both = {name: outputs[1][name][i : i + 1] for name in STAGE2_OUTPUTS}
        assert torch.equal(single["num_detections"], both["num_detections"])
        assert single["num_detections"] >= 1
        assert torch.equal(single["labels"], both["labels"])
        torch.testing.assert_close(single["boxes"], both["boxes"], atol=0.01, rtol=0)
        torch.testing.assert_close(single["scores"], both["scores"], atol=1e-4, rtol=0)
        torch.testing.assert_close(single["masks"], both["masks"], atol=1e-3, rtol=0)


def test_the_canvas_outside_an_image_does_not_matter(
    model: CoMask, outputs: tuple[Outputs, Outputs]
) -> None:
    images, other = noise_images(2, HEIGHT, WIDTH), noise_images(2, HEIGHT, WIDTH, seed=1)
    for i, (height, width) in enumerate(SIZES.tolist()):
        other[i, :height, :width] = images[i, :height, :width]
    assert not torch.equal(images, other)
    first, second = run(model, other, SIZES)
    assert all(torch.equal(first[name], outputs[0][name]) for name in STAGE1_OUTPUTS)
    assert all(torch.equal(second[name], outputs[1][name]) for name in STAGE2_OUTPUTS)


def test_the_first_proposals_may_be_passed_alone(
    model: CoMask, outputs: tuple[Outputs, Outputs]
) -> None:
    first = dict(outputs[0])
    some = {name: first[name][:, :12] for name in ("proposals", "proposal_scores")}
    without = first | {"proposal_scores": first["proposal_scores"].clone()}
    without["proposal_scores"][:, 12:] = 0  # the same, said by padding
    with torch.no_grad():
        short = model.stage2(**(first | some), image_sizes=SIZES)
        long = model.stage2(**without, image_sizes=SIZES)
    assert short["num_detections"].min() >= 1
    for name in STAGE2_OUTPUTS:
        torch.testing.assert_close(short[name], long[name], atol=1e-4, rtol=1e-5)


def test_diagnostics_tell_what_the_collaboration_did(
    model: CoMask, outputs: tuple[Outputs, Outputs]
) -> None:
    first, second = outputs
    assert tuple(second) == STAGE2_OUTPUTS + DIAGNOSTIC_OUTPUTS
    boxes, masks, weights, plain = (second[name] for name in DIAGNOSTIC_OUTPUTS)
    for i, found in enumerate(second["num_detections"].tolist()):
        proposals = {tuple(box) for box in first["proposals"][i].tolist()}
        assert all(tuple(box) in proposals for box in boxes[i, :found].tolist())
    pooled = masks.reshape(2, -1, 7, 4, 7, 4).mean(dim=(3, 5))
    passing = torch.where(pooled > 0.5, pooled, 0.0)
    nothing = passing.sum(dim=(2, 3), keepdim=True) == 0
    torch.testing.assert_close(weights, torch.where(nothing, pooled, passing))
    assert (weights == 0).any()
    assert not torch.equal(plain, second["boxes"])


@pytest.mark.parametrize("collaboration", ["weighted", "uniform"])
@torch.no_grad()
def test_boxes_and_masks_come_from_two_passes_of_one_head(collaboration: str) -> None:
    model = tiny_model(collaboration=collaboration)
    first, second = run(model, noise_images(2, HEIGHT, WIDTH), SIZES, diagnostics=True)
    pyramid = [first[name] for name in ("p2", "p3", "p4", "p5")]
    start, labels = second["first_boxes"], second["labels"].flatten().long()
    offsets = model.head(model.pool(pyramid, start, POOL_SIZE), labels).offsets
    cells = decode_cells(offsets, start.reshape(-1, 4))
    if collaboration == "uniform":
        mean = cells.mean(dim=(1, 2)).reshape(start.shape)
    else:
        weights = second["cell_weights"].flatten(0, 1)
        mean = torch.einsum("rij,rijc->rc", weights, cells) / weights.sum(dim=(1, 2))[:, None]
        mean = mean.reshape(start.shape)
    found = second["scores"] > 0
    plain = clip_boxes(cells.mean(dim=(1, 2)).reshape(start.shape), SIZES)
    torch.testing.assert_close(second["plain_boxes"][found], plain[found], atol=1e-3, rtol=0)
    refined = clip_boxes(mean, SIZES)
    torch.testing.assert_close(second["boxes"][found], refined[found], atol=1e-3, rtol=0)
    assert (refined - start)[found].abs().max() > 1
    logits = class_masks(model.head, model.pool(pyramid, second["boxes"], POOL_SIZE))
    masks = logits[torch.arange(len(labels)), labels + 1].sigmoid().reshape(2, -1, 28, 28)
    torch.testing.assert_close(second["masks"][found], masks[found], atol=1e-4, rtol=0)
    assert (second["masks"] - second["coarse_masks"])[found].abs().max() > 0.01


def test_presets_differ_as_tables_1_to_3_do() -> None:
    sizes = {}
    for name, config in PRESETS.items():
        with torch.device("meta"):
            sizes[name] = parameter_count(CoMask(config.model, config.preprocess))
    downsample, merge = 256 * 256 * 9 + 512, 256 * 256  # of one MSFEM; five levels have one
    assert sizes["comask2-r50"] - sizes["comask1-r50"] == 5 * (downsample + merge)
    assert sizes["comask-r50"] - sizes["comask2-r50"] == 5 * (5 * downsample + 2 * merge)
    assert sizes["no-collaboration-r50"] == sizes["comask-r50"]
    bottleneck = 1024 * 256 + 256 * 256 * 9 + 256 * 1024 + 2 * (256 + 256 + 1024)
    assert sizes["comask-r101"] - sizes["comask-r50"] == (23 - 6) * bottleneck
    paper = PRESETS["comask-r50"]
    assert (paper.model.msfem_branches, paper.model.collaboration) == (4, "weighted")
    uniform = PRESETS["no-collaboration-r50"]
    assert uniform == replace(paper, model=replace(paper.model, collaboration="uniform"))
