"""The options beyond the paper: boxes of the second pass, agreement of both passes, mask scoring."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import MICRO, settings
from conftest import run as comask
from from_training_to_engines import go_from_training_to_engines
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from strategies import FULL, ONE, noise_images, tiny_model
from strategies import SIZES as TARGET_SIZES
from torch import Tensor

from comask.bundle import graph_file
from comask.calib.qdq import graph_layers
from comask.config import Config, ModelConfig
from comask.config_reading import override
from comask.data.training_set import MaskCrops, Target
from comask.errors import ConfigError
from comask.models.box_refinement import CELLS, POOL_SIZE, average_box, decode_cells
from comask.models.boxes import clip_boxes, paired_iou
from comask.models.comask import STAGE1_OUTPUTS, CoMask
from comask.models.mask_scoring import STEP, MaskScorer
from comask.runtime.images import FOUND_AT
from comask.structures import Detections
from comask.training.losses import Objective
from comask.training.targets import mask_iou, mask_targets

SIZES = torch.tensor([[90, 100], [64, 128]], dtype=torch.int32)
ALL = {"agreement_score": True, "second_boxes": True, "mask_scoring": True}
Outputs = dict[str, Tensor]


@cache
def plain_model() -> CoMask:
    return tiny_model(mask_scoring=True)


def outputs(**changes: Any) -> Outputs:
    """Runs the same weights with other options, to which `mask_scoring` belongs only if it is named."""
    model = plain_model()
    scorer, config = model.mask_scorer, model.config
    try:
        model.config = replace(config, **{"mask_scoring": False, **changes})
        model.mask_scorer = scorer if model.config.mask_scoring else None
        with torch.no_grad():
            first = model.stage1(noise_images(2, 96, 128), SIZES)
            return {**first, **model.stage2(**first, image_sizes=SIZES, diagnostics=True)}
    finally:
        model.mask_scorer, model.config = scorer, config


@cache
def plain() -> Outputs:
    return outputs()


@cache
@torch.no_grad()
def again() -> tuple[Tensor, Tensor]:
    """Returns the second pass's boxes of the plain outputs, and the logits of their masks' scores."""
    model, second = plain_model(), plain()
    pyramid = [second[name] for name in ("p2", "p3", "p4", "p5")]
    boxes, labels = second["boxes"], second["labels"].flatten().long()
    masks, offsets, features = model.head(model.pool(pyramid, boxes, POOL_SIZE), labels)
    flat = boxes.reshape(-1, 4)
    moved = average_box(decode_cells(offsets, flat), model.weigh_cells(masks), flat)
    assert model.mask_scorer
    return clip_boxes(moved.reshape(boxes.shape), SIZES), model.mask_scorer(features, masks)


def assert_rows_are(found: Outputs, expected: Outputs) -> None:
    """Compares all outputs with expected rows that are not in order, nor zeros behind the last."""
    for i, count in enumerate(found["num_detections"].tolist()):
        order = torch.argsort(expected["scores"][i], descending=True, stable=True)[:count]
        for name, rows in expected.items():
            torch.testing.assert_close(found[name][i, :count], rows[i, order], atol=1e-4, rtol=1e-4)
            assert not found[name][i, count:].any()
        assert (found["scores"][i].diff() <= 0).all()


def test_agreement_is_the_iou_of_both_passes_boxes() -> None:
    moved, _ = again()
    agreement = paired_iou(plain()["boxes"], moved)
    assert 0 < agreement[0, 0] < 1
    names = ("boxes", "masks", "labels", "first_boxes", "coarse_masks", "cell_weights")
    expected = {name: plain()[name] for name in names}
    expected |= {"class_scores": plain()["scores"], "scores": plain()["scores"] * agreement}
    found = outputs(agreement_score=True)
    assert (found["num_detections"] > 1).all()
    assert "mask_boxes" not in found
    assert_rows_are(found, expected)
    assert (found["class_scores"].diff(dim=1) > 0).any()  # it has changed the order


def test_boxes_of_the_second_pass_leave_masks_where_they_are() -> None:
    found = outputs(second_boxes=True)
    assert "class_scores" not in found
    for name in ("num_detections", "scores", "labels", "masks"):
        assert torch.equal(found[name], plain()[name])
    assert torch.equal(found["mask_boxes"], plain()["boxes"])
    valid = plain()["scores"] > 0
    torch.testing.assert_close(found["boxes"][valid], again()[0][valid], atol=1e-3, rtol=0)
    assert not found["boxes"][~valid].any()


def test_all_options_together_multiply_their_factors() -> None:
    moved, logits = again()
    estimate = torch.sigmoid(logits).reshape(moved.shape[:2])
    scores = plain()["scores"]
    expected = {
        "scores": scores * paired_iou(plain()["boxes"], moved) * estimate,
        "class_scores": scores,
        "boxes": moved,
        "mask_boxes": plain()["boxes"],
        "masks": plain()["masks"],
    }
    found = outputs(**ALL)
    assert (found["num_detections"] > 1).all()
    assert_rows_are(found, expected)


def test_nms_after_the_second_pass_takes_its_scores_and_boxes() -> None:
    found = outputs(**ALL, nms_iou=0.9, refined_nms_iou=0.3)
    every = outputs(**ALL, nms_iou=0.9)
    assert (found["num_detections"] < every["num_detections"]).all()
    assert (found["scores"].diff(dim=1) <= 0).all()
    for i, count in enumerate(found["num_detections"].tolist()):
        boxes, labels = found["boxes"][i, :count], found["labels"][i, :count]
        one, other = torch.triu_indices(count, count, 1)
        alike = labels[one] == labels[other]
        assert (paired_iou(boxes[one], boxes[other])[alike] <= 0.3).all()


def test_a_score_that_is_not_a_number_is_told() -> None:
    first = {name: plain()[name].clone() for name in STAGE1_OUTPUTS}
    first["proposal_scores"][0, 0] = torch.nan
    model = plain_model()
    with torch.no_grad():
        found = model.stage2(**first, image_sizes=SIZES)
    assert found["num_detections"][0] == -1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("model.collaboration=fc_reg", "model.second_boxes=true"), "second_boxes"),
        (("model.collaboration=fc_reg", "model.agreement_score=true"), "agreement_score"),
        (
            (
                "model.train_refined_masks=true",
                "model.separate_fine_head=true",
                "model.agreement_score=true",
            ),
            "predicts no boxes",
        ),
    ],
)
def test_options_that_cannot_work_are_errors(changes: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override(Config(), changes)


def test_the_first_pass_is_judged_without_the_second_ones_factors() -> None:
    assert FOUND_AT["first"]["scores"] == "class_scores"
    assert FOUND_AT["first"]["mask_boxes"] == "first_boxes"


def detections(**changes: Any) -> Detections:
    rng = np.random.default_rng(3)
    boxes = np.array([[10, 12, 50, 40], [5, 5, 20, 60]], np.float32)
    return Detections(
        **{
            "boxes_xyxy": boxes,
            "scores": np.array([0.9, 0.5], np.float32),
            "labels": np.array([0, 1]),
            "mask_probs": rng.random((2, 28, 28), np.float32),
            "image_size": (70, 60),
            **changes,
        }
    )


def test_masks_are_pasted_into_their_own_boxes() -> None:
    frames = np.array([[0, 0, 30, 30], [20, 10, 55, 66]], np.float32)
    framed, expected = detections(mask_boxes_xyxy=frames), detections(boxes_xyxy=frames)
    assert np.array_equal(framed.masks, expected.masks)
    assert not np.array_equal(framed.masks, detections().masks)
    assert framed.to_rle() == expected.to_rle()
    assert [entry["bbox"] for entry in framed.to_coco(1)] == [
        entry["bbox"] for entry in detections().to_coco(1)
    ]
    for one, other in zip(framed.crop(1), expected.crop(1), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(framed[[1]].masks, expected.masks[[1]])
    large, expected_large = framed.resized((140, 180)), expected.resized((140, 180))
    assert np.array_equal(large.masks, expected_large.masks)
    assert np.array_equal(large.boxes_xyxy, detections().boxes_xyxy * np.float32([3, 2, 3, 2]))
    with pytest.raises(ValueError, match="mask_boxes_xyxy"):
        detections(mask_boxes_xyxy=frames[:1])


def test_the_scorer_sees_every_pixel_of_the_mask_in_its_cell() -> None:
    config = ModelConfig(channels=16, head_channels=16, norm_groups=4)
    scorer = MaskScorer(config)
    masks = torch.full((1, 28, 28), -20.0)
    masks[0, 9, 14] = 20.0
    seen: list[Tensor] = []
    scorer.convs.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scorer(torch.zeros(1, 16, CELLS, CELLS), masks)
    place = 16 + (9 % STEP) * STEP + 14 % STEP
    assert seen[0][0, place, 9 // STEP, 14 // STEP] > 0.99
    assert seen[0].sum() < 1.01


@given(st.integers(0, 10_000), st.floats(0.3, 1.0))
def test_mask_iou_equals_pycocotools_on_pixels(seed: int, share: float) -> None:
    """A RoI of 28 times whole pixels has a mask whose cells are pixels, so both IoUs are the same."""
    rng = np.random.default_rng(seed)
    bitmap = (rng.random((60, 80)) < share).astype(np.uint8)
    x, y = int(rng.integers(0, 52)), int(rng.integers(0, 32))
    found = (rng.random((28, 28)) < 0.5).astype(np.uint8)
    whole = np.zeros_like(bitmap)
    whole[y : y + 28, x : x + 28] = found
    encoded = [coco_mask.encode(np.asfortranarray(mask)) for mask in (whole, bitmap)]
    expected = coco_mask.iou(encoded[:1], encoded[1:], [0])[0, 0]
    target = Target(
        boxes=torch.tensor([[0.0, 0, 80, 60]]),
        crowds=torch.zeros(0, 4),
        labels=torch.zeros(1, dtype=torch.int64),
        masks=MaskCrops.of([(0, 0, bitmap)], (60, 80)),
        mask_scale=torch.ones(4),
    )
    rois, objects = torch.tensor([[x, y, x + 28.0, y + 28.0]]), torch.zeros(1, dtype=torch.int64)
    cuts = mask_targets(target, rois, objects, 28)
    found_iou = mask_iou(torch.from_numpy(found)[None].float(), cuts, target, rois, objects)
    assert found_iou.item() == pytest.approx(expected, abs=1e-6)


def test_the_branch_learns_and_changes_no_other_gradient() -> None:
    gradients = []
    for scoring in (False, True):
        model = tiny_model(mask_scoring=scoring).train()
        losses = Objective(model)(noise_images(2, 96, 128), TARGET_SIZES, [FULL, ONE])
        sum(losses.values()).backward()  # type: ignore[union-attr]
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert ("mask_score" in losses) == scoring
    without, scored = gradients
    own = scored.keys() - without.keys()
    assert own
    assert all(name.startswith("mask_scorer.") for name in own)
    assert all(torch.equal(without[name], scored[name]) for name in without)
    assert all(scored[name].any() for name in own)


def test_a_checkpoint_gets_the_free_options_at_export(tmp_path: Path) -> None:
    assert comask(
        "train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run",
        *settings(*MICRO, "train.max_steps=0", "train.evaluate_every=0", "model.mask_scoring=true"),
    ).exit_code == 0  # fmt: skip
    checkpoint = tmp_path / "run" / "checkpoint-best.pt"
    result = comask(
        "export", checkpoint, "--output", tmp_path / "bundle", "--score-threshold", "0",
        "--precision", "fp32,fp16", "--limit", "1", "--diagnostics",
        *settings("model.agreement_score=true", "model.second_boxes=true"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["model"]["second_boxes"]
    assert manifest["model"]["agreement_score"]
    names = [output["name"] for output in manifest["graphs"]["stage2"]["outputs"]]
    assert names[5:7] == ["mask_boxes", "class_scores"]
    result = comask(
        "export", checkpoint, "--output", tmp_path / "other", *settings("model.channels=32")
    )
    assert result.exit_code == 1
    assert "model.channels" in result.output


@pytest.mark.slow
def test_from_training_to_engines(tmp_path: Path) -> None:
    bundle = go_from_training_to_engines(
        tmp_path,
        (*MICRO, "model.mask_scoring=true", "train.evaluate_every=0"),
        ("model.agreement_score=true", "model.second_boxes=true"),
    )
    layers, still_float = (
        {layer.name for layer in graph_layers(onnx.load(bundle / graph_file("stage2", precision)))}
        for precision in ("fp16", "int8")
    )
    own = {"mask_scorer.convs.0", "mask_scorer.convs.3", "mask_scorer.iou"}
    assert own <= layers - still_float
