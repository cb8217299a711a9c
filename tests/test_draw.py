"""Overlays: what is drawn and what is left alone, down to pictures of one pixel."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from comask.draw import class_color, draw_overlay
from comask.structures import Detections


def found(
    boxes: list[list[float]], image_size: tuple[int, int], labels: list[int] | None = None
) -> Detections:
    """Detections with full masks and falling scores."""
    count = len(boxes)
    return Detections(
        boxes_xyxy=np.array(boxes, np.float32).reshape(count, 4),
        scores=np.linspace(0.95, 0.5, count, dtype=np.float32),
        labels=np.array(labels or [0] * count, np.int64),
        mask_probs=np.ones((count, 28, 28), np.float32),
        image_size=image_size,
    )


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("image_size", [(1, 1), (12, 480), (480, 12), (40, 1), (160, 128), (5, 7)])
def test_any_size(image_size: tuple[int, int]) -> None:
    height, width = image_size
    image = noise(height, width)
    before = image.copy()
    boxes = [
        [0, 0, width, height],
        [-5, -5, width / 2, height + 9],
        [width / 3, height / 3, width / 2, height / 2],
        [width + 10, 0, width + 20, height],
        [2, 2, 2, 2],
        [np.nan, 0, np.inf, 3],
    ]
    overlay = draw_overlay(image, found(boxes, image_size))
    assert overlay.shape == image.shape
    assert overlay.dtype == np.uint8
    assert not np.shares_memory(overlay, image)
    assert (overlay != image).any()
    np.testing.assert_array_equal(image, before)


def test_nothing_found_leaves_the_image() -> None:
    image = noise(30, 40)
    image.flags.writeable = False
    overlay = draw_overlay(image, found([], (30, 40)))
    np.testing.assert_array_equal(overlay, image)
    assert overlay.flags.writeable


def test_mask_is_tinted_and_the_rest_is_left() -> None:
    image = np.full((300, 400, 3), 128, np.uint8)
    overlay = draw_overlay(image, found([[100, 120, 200, 220]], (300, 400), [7]))
    inside = overlay[130:210, 110:190].reshape(-1, 3)
    expected = 0.75 * 128 + 0.25 * np.array(class_color(7))
    np.testing.assert_allclose(inside.mean(axis=0), expected, atol=1)
    np.testing.assert_array_equal(overlay[225:], image[225:])
    np.testing.assert_array_equal(overlay[:, 210:], image[:, 210:])
    tag = overlay[100:117, 100:130].reshape(-1, 3)  # above the box
    assert (tag == class_color(7)).all(axis=1).mean() > 0.3


def test_higher_score_is_on_top() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    boxes = [[50.0, 50.0, 250.0, 250.0]] * 2
    both = found(boxes, (300, 300), [0, 1])
    np.testing.assert_array_equal(
        draw_overlay(image, both), draw_overlay(image, both[np.array([1, 0])])
    )
    red, green, _ = draw_overlay(image, both)[150, 150].astype(int)
    assert red > green  # label 0 is red


def test_tags_without_scores_hold_names_alone() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    one = found([[50.0, 50.0, 250.0, 250.0]], (300, 300))
    other = dataclasses.replace(one, scores=one.scores / 2)
    bare = draw_overlay(image, one, show_scores=False)
    np.testing.assert_array_equal(bare, draw_overlay(image, other, show_scores=False))
    assert (draw_overlay(image, one) != draw_overlay(image, other)).any()
    assert (bare != draw_overlay(image, one)).any()


def test_tag_does_not_hide_a_small_object() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    small = [[140.0, 0.0, 150.0, 10.0], [0.0, 290.0, 10.0, 300.0]]
    overlay = draw_overlay(image, found(small, (300, 300)))
    tint = 0.25 * np.array(class_color(0))
    np.testing.assert_allclose(overlay[4:6, 144:146].astype(float).mean((0, 1)), tint, atol=1)
    np.testing.assert_allclose(overlay[294:296, 4:6].astype(float).mean((0, 1)), tint, atol=1)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((30, 41, 3), np.uint8),
        np.zeros((30, 40), np.uint8),
        np.zeros((30, 40, 3), np.float32),
    ],
)
def test_refuses_another_image(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image: expected uint8 \(30, 40, 3\)"):
        draw_overlay(image, found([], (30, 40)))


def test_class_colors() -> None:
    colors = np.array([class_color(label) for label in range(80)])
    assert len(np.unique(colors, axis=0)) == 80
    assert colors.min() >= 0
    assert colors.max() <= 255
    assert np.linalg.norm(np.diff(colors, axis=0), axis=1).min() > 100  # neighbours differ
    # Written down: a class keeps its colour from one version to the next.
    assert class_color(0) == (255, 25, 25)
    assert class_color(0) == class_color(0)
