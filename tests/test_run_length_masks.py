"""`Detections` whose masks are given as pixels: everything that takes detections takes these."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from made_masks import detections
from pycocotools import mask as coco

from comask.draw import draw_overlay
from comask.masks import paste_probs, resized_mask, run_length_mask

SIDES = st.integers(1, 12)


@given(hnp.arrays(np.bool_, st.tuples(st.integers(0, 3), SIDES, SIDES)))
def test_all_forms_of_the_masks_agree(masks: np.ndarray) -> None:
    size = masks.shape[1:]
    found = detections(list(masks), size)
    np.testing.assert_array_equal(found.masks, masks)
    encoded = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    assert [rle["counts"] for rle in found.to_rle()] == [e["counts"].decode() for e in encoded]
    for index, mask in enumerate(masks):
        x, y, crop = found.crop(index)
        pasted = np.zeros(size, np.bool_)
        pasted[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        np.testing.assert_array_equal(pasted, mask)
        assert found.crop_probs(index)[:2] == (x, y)
        np.testing.assert_array_equal(found.crop_probs(index)[2], crop.astype(np.float32))


@given(hnp.arrays(np.bool_, st.tuples(SIDES, SIDES)), st.integers(0, 9), st.integers(0, 9))
def test_a_crop_at_a_place(crop: np.ndarray, x: int, y: int) -> None:
    size = y + crop.shape[0] + 2, x + crop.shape[1] + 1
    expected = np.zeros(size, np.bool_)
    expected[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    mask = run_length_mask(x, y, crop, size)
    np.testing.assert_array_equal(mask.bitmap(), expected)
    assert mask.runs.sum() == expected.size


@given(hnp.arrays(np.bool_, st.tuples(SIDES, SIDES)), st.tuples(SIDES, SIDES))
def test_resized_masks_have_the_nearest_pixels(mask: np.ndarray, size: tuple[int, int]) -> None:
    expected = np.zeros(size, np.bool_)
    for y, x in np.ndindex(size):
        row, column = (y + 0.5) * mask.shape[0] / size[0], (x + 0.5) * mask.shape[1] / size[1]
        expected[y, x] = mask[int(row + 1e-9), int(column + 1e-9)]
    resized = resized_mask(run_length_mask(0, 0, mask, mask.shape), size)
    np.testing.assert_array_equal(resized.bitmap(), expected)


def test_indexing_drawing_and_sizes() -> None:
    masks = [np.zeros((20, 30), np.bool_) for _ in range(3)]
    masks[0][2:9, 3:12] = masks[1][11:19, 1:25] = masks[2][5:15, 20:29] = True
    found = detections(masks, (20, 30), [0.9, 0.8, 0.7], [0, 1, 2])
    part = found[np.array([False, True, True])]
    np.testing.assert_array_equal(part.masks, masks[1:])
    assert part.to_rle() == found.to_rle()[1:]  # both before and after the RLEs are known
    np.testing.assert_array_equal(found[::-1].masks, masks[::-1])
    drawn = draw_overlay(np.zeros((20, 30, 3), np.uint8), found)
    assert drawn[4, 7].any()
    double = found.resized((40, 60))
    np.testing.assert_array_equal(double.boxes_xyxy, found.boxes_xyxy * 2)
    expected = np.array(masks).repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(double.masks, expected)
    none = found[:0]
    assert none.masks.shape == (0, 20, 30)
    assert none.to_coco(1) == none.resized((40, 60)).to_rle() == []


@pytest.mark.parametrize(
    ("change", "text"),
    [({"mask_probs": np.zeros((1, 28, 28), np.float32)}, r"mask_probs \[N, 0, 0\]"),
     ({"mask_boxes_xyxy": np.zeros((1, 4), np.float32)}, "no mask_boxes_xyxy"),
     ({"run_length_masks": ()}, "expected 1 of"), ({"image_size": (4, 5)}, r"got 1 of \[\(5, 4\)\]")],
    ids=["probabilities", "boxes", "number", "size"],
)  # fmt: skip
def test_refuses(change: dict[str, Any], text: str) -> None:
    found = detections([np.ones((5, 4), np.bool_)], (5, 4))
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(found, **change)


def test_probabilities_at_an_images_own_pixels() -> None:
    """A box of whole pixels with a cell per pixel is pasted as it is."""
    probs = np.random.default_rng(3).random((4, 6), np.float32)
    x, y, values = paste_probs(probs, [2, 1, 8, 5], (9, 10))
    inside = values[1 - y : 5 - y, 2 - x : 8 - x]
    np.testing.assert_array_equal(inside, probs)
