"""Pasting against torch's grid_sample, RLEs against pycocotools' own encoder and decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from comask.errors import DataError
from comask.masks import paste_mask, paste_masks, rles_from_mask_probs
from comask.segmentation import read_segmentation

THRESHOLDS = st.sampled_from([0.3, 0.5, 0.7])
SIZES = st.tuples(st.integers(1, 50), st.integers(1, 50))


@st.composite
def boxes_around(draw: st.DrawFn, image_size: tuple[int, int]) -> np.ndarray:
    """[1, 4] f32: inside, partly or wholly outside, or over the image's full height."""
    height, width = image_size
    x1 = draw(st.floats(-width, 1.2 * width))
    x2 = x1 + draw(st.floats(0.1, 2 * width + 1))
    if draw(st.booleans()):
        y1, y2 = -draw(st.integers(0, 60)), height + draw(st.integers(0, 60))
    else:
        y1 = draw(st.floats(-height, 1.2 * height))
        y2 = y1 + draw(st.floats(0.1, 2 * height + 1))
    return np.array([[x1, y1, x2, y2]], np.float32)


@st.composite
def pasting_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[int, int], float]:
    """Mask probabilities, box, image size and threshold of one instance."""
    size = draw(SIZES)
    cells = draw(st.sampled_from([1, 7, 28]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    probs = rng.random((1, cells, cells), np.float32)
    level = draw(st.sampled_from([None, None, None, 0.0, 1.0]))
    if level is not None:
        probs[:] = level
    return probs, draw(boxes_around(size)), size, draw(THRESHOLDS)


def sampled_probabilities(
    probs: np.ndarray, box: np.ndarray, image_size: tuple[int, int]
) -> np.ndarray:
    """[H, W] f64 by grid_sample over the whole image, as detectron2 pastes."""
    x1, y1, x2, y2 = box.astype(np.float64)
    xs = (torch.arange(image_size[1], dtype=torch.float64) + 0.5 - x1) / (x2 - x1) * 2 - 1
    ys = (torch.arange(image_size[0], dtype=torch.float64) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)
    image = torch.from_numpy(probs.astype(np.float64))[None, None]
    return torch.nn.functional.grid_sample(image, grid[None], align_corners=False)[0, 0].numpy()


@settings(max_examples=200, deadline=None)
@given(case=pasting_cases())
def test_pasting_is_grid_sample(case: Any) -> None:
    probs, boxes, size, threshold = case
    expected = sampled_probabilities(probs[0], boxes[0], size)
    pasted = paste_masks(probs, boxes, size, threshold)[0]
    clear = np.abs(expected - threshold) > 1e-5
    np.testing.assert_array_equal(pasted[clear], (expected >= threshold)[clear])


@settings(max_examples=200, deadline=None)
@given(case=pasting_cases())
def test_rle_is_that_of_pycocotools(case: Any) -> None:
    masks = paste_masks(*case)
    (rle,) = rles_from_mask_probs(*case)
    expected = coco.encode(np.asfortranarray(masks[0], np.uint8))
    assert rle == {"size": list(case[2]), "counts": expected["counts"].decode()}
    np.testing.assert_array_equal(read_segmentation(rle, *case[2]).bitmap(), masks[0])


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_rle_of_empty_and_full_mask(level: float) -> None:
    probs = np.full((1, 28, 28), level, np.float32)
    box = np.array([[-10, -10, 30, 30]], np.float32)
    assert paste_masks(probs, box, (7, 9), 0.5).all() == bool(level)
    (rle,) = rles_from_mask_probs(probs, box, (7, 9), 0.5)
    assert rle["counts"] == coco.encode(np.full((7, 9), level, np.uint8, "F"))["counts"].decode()


@pytest.mark.parametrize(
    "box",
    [
        (3, 3, 3, 8),  # no width
        (3, 8, 6, 8),  # no height
        (8, 8, 3, 3),  # inverted
        (np.nan, 0, 5, 5),
        (0, 0, np.inf, 5),
        (-np.inf, 0, np.inf, 5),
        (40, 0, 50, 5),  # right of the image
        (0, -20, 5, -9),  # above it
    ],
)
def test_degenerate_box_has_no_pixels(box: tuple[float, ...]) -> None:
    probs = np.ones((1, 28, 28), np.float32)
    assert paste_mask(probs[0], box, (10, 20), 0.3)[2].size == 0
    boxes = np.array([box], np.float32)
    assert not paste_masks(probs, boxes, (10, 20), 0.3).any()
    (rle,) = rles_from_mask_probs(probs, boxes, (10, 20), 0.3)
    assert rle["counts"] == coco.encode(np.zeros((10, 20), np.uint8, "F"))["counts"].decode()


def test_no_instances() -> None:
    probs, boxes = np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32)
    assert paste_masks(probs, boxes, (4, 5), 0.5).shape == (0, 4, 5)
    assert rles_from_mask_probs(probs, boxes, (4, 5), 0.5) == []


def test_polygons_are_united_and_degenerate_ones_ignored() -> None:
    squares = [[1, 1, 4, 1, 4, 4, 1, 4], [6, 2, 9, 2, 9, 5, 6, 5]]
    mask = read_segmentation([*squares, [0, 0, 9, 9], []], 8, 10).bitmap()
    assert mask.dtype == np.bool_
    expected = np.zeros((8, 10), bool)
    expected[1:4, 1:4] = expected[2:5, 6:9] = True
    np.testing.assert_array_equal(mask, expected)
    assert not read_segmentation([[0, 0, 9, 9]], 8, 10).bitmap().any()
    assert not read_segmentation([], 8, 10).bitmap().any()


@settings(max_examples=100, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**32 - 1), density=st.floats(0, 1))
def test_rles_are_decoded(size: tuple[int, int], seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random(size) < density
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    runs = np.diff(edges, prepend=0, append=flat.size).tolist()
    compressed = coco.encode(np.asfortranarray(mask, np.uint8))["counts"]
    for counts in (runs, compressed, compressed.decode()):
        decoded = read_segmentation({"size": list(size), "counts": counts}, *size).bitmap()
        np.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        (None, "a list of polygons or an RLE dict, got None"),
        ([1, 2, 3, 4, 5, 6], "polygons that are lists .*, got 1"),
        ([[1, 2, 3, 4, 5, 6, 7]], "polygons that are lists"),
        ([["a", 2, 3, 4, 5, 6]], "polygons that are lists"),
        ([[float("nan"), 2, 3, 4, 5, 6]], "polygons that are lists"),
        ([[1e12, 2, 3, 4, 5, 6]], "polygons that are lists"),
        ([[10**400, 2, 3, 4, 5, 6]], "polygons that are lists"),
        ({"counts": [80]}, r"size \[8, 10\], got None"),
        ({"size": [10, 8], "counts": [80]}, r"size \[8, 10\], got \[10, 8\]"),
        ({"size": [8, 10]}, "8 x 10 pixels, got None"),
        ({"size": [8, 10], "counts": [70]}, r"8 x 10 pixels, got \[70\]"),
        ({"size": [8, 10], "counts": [60, -5, 25]}, "8 x 10 pixels"),
        ({"size": [8, 10], "counts": [60.0, 20.0]}, "8 x 10 pixels"),
        ({"size": [8, 10], "counts": "zz"}, "8 x 10 pixels, got 'zz'"),
        ({"size": [8, 10], "counts": b""}, "8 x 10 pixels"),
    ],
)
def test_malformed_segmentation(segmentation: object, expected: str) -> None:
    with pytest.raises(DataError, match=f"segmentation: expected .*{expected}"):
        read_segmentation(segmentation, 8, 10).bitmap()
