"""`Detections`: what it refuses, how it is filtered, and the COCO results it makes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from comask.structures import Detections

NAMES = ("person", "bicycle", "car")


def detections(count: int = 3, **changes: Any) -> Detections:
    """`count` 4x4 boxes side by side in a 12x40 image, their masks full."""
    left = 5 * np.arange(count, dtype=np.float32)
    top = np.full(count, 2, np.float32)
    fields: dict[str, Any] = {
        "boxes_xyxy": np.stack([left, top, left + 4, top + 4], axis=1),
        "scores": np.linspace(0.9, 0.5, count, dtype=np.float32),
        "labels": np.arange(count, dtype=np.int64) % 3,
        "mask_probs": np.ones((count, 28, 28), np.float32),
        "image_size": (12, 40),
        "class_names": NAMES,
    }
    return Detections(**(fields | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("boxes_xyxy", np.zeros((3, 4))),
        ("boxes_xyxy", np.zeros((2, 4), np.float32)),
        ("scores", np.zeros((3, 1), np.float32)),
        ("labels", np.zeros(3, np.int32)),
        ("mask_probs", np.zeros((3, 28, 14), np.float32)),
        ("mask_probs", np.zeros((3, 28, 28), np.bool_)),
        ("image_size", (0, 40)),
        ("labels", np.array([0, 1, 3])),
        ("labels", np.array([-1, 1, 2])),
    ],
)
def test_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Detections.{field}: expected"):
        detections(**{field: value})


@pytest.mark.parametrize(
    "index", [slice(1, None), np.array([False, True, True]), np.array([1, 2])], ids=type
)
def test_indexing_filters_every_field(index: Any) -> None:
    probs = np.random.default_rng(0).random((3, 28, 28), np.float32)
    whole = detections(mask_probs=probs, category_ids=(1, 2, 90), mask_threshold=0.4)
    part = whole[index]
    assert len(part) == 2
    for name in ("boxes_xyxy", "scores", "labels", "mask_probs", "masks"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[1:])
    for name in ("image_size", "class_names", "category_ids", "mask_threshold"):
        assert getattr(part, name) == getattr(whole, name)


def test_masks_are_pasted_once() -> None:
    found = detections()
    masks = found.masks
    assert masks is found.masks
    assert masks.shape == (3, 12, 40)
    assert masks.dtype == np.bool_
    assert masks[0, 2:6, 0:4].all()
    assert masks[0].sum() == 16


@pytest.mark.parametrize(
    ("category_ids", "expected"), [(None, [1, 2, 3]), ((1, 2, 90), [1, 2, 90])]
)
def test_to_coco(category_ids: tuple[int, ...] | None, expected: list[int]) -> None:
    results = detections(category_ids=category_ids).to_coco(image_id=7)
    assert [result["category_id"] for result in results] == expected
    assert [result["bbox"] for result in results] == [[5.0 * i, 2.0, 4.0, 4.0] for i in range(3)]
    assert {result["image_id"] for result in results} == {7}
    assert results[0]["score"] == pytest.approx(0.9)
    assert coco.area([result["segmentation"] for result in results]).tolist() == [16, 16, 16]


@pytest.mark.parametrize(
    "change",
    [{"mask_threshold": 0.9}, {"image_size": (9, 30)},
     {"mask_probs": np.full((3, 28, 28), 0.7, np.float32).cumprod(axis=1)},
     {"boxes_xyxy": np.array([[1, 1, 8, 7]] * 3, np.float32)}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_changed_copy_has_rles_of_its_own_masks(change: dict[str, Any]) -> None:
    slope = np.linspace(0, 1, 28, dtype=np.float32) * np.ones((3, 28, 1), np.float32)
    whole = detections(mask_probs=slope)
    known = whole.with_rles(whole.to_rle())
    assert known.has_rles
    assert known[1:].to_rle() == whole.to_rle()[1:]
    changed = dataclasses.replace(known, **change)
    assert not changed.has_rles
    assert changed.to_rle() != whole.to_rle()
    decoded = coco.decode(changed.to_rle()).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded, changed.masks)
    with pytest.raises(ValueError, match="expected 3 RLEs, got 2"):
        whole.with_rles(whole.to_rle()[1:])


def test_names() -> None:
    assert detections().name(2) == "car"
    assert detections(class_names=None).name(2) == "2"


def test_empty() -> None:
    empty = detections(0)
    assert len(empty) == 0
    assert empty.masks.shape == (0, 12, 40)
    assert empty.to_coco(image_id=1) == []
    assert len(empty[empty.scores > 0.5]) == 0
