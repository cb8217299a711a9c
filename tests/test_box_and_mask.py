"""Boxes that do not fit their masks: what is close enough, and which mistake is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torchvision.ops import box_iou

from comask.data.check_annotations import Bounds, fits, iou, likely_cause

WIDTH, HEIGHT = 640, 400
BOUNDS = (200, 100, 260, 220)  # of a mask

Wrong = Callable[[float, float, float, float], tuple[float, float, float, float]]
# What an annotation file would say of a mask with these bounds.
MISTAKES: dict[str, Wrong] = {
    "corners x1, y1, x2, y2": lambda a, b, c, d: (a, b, c, d),
    "centre and size": lambda a, b, c, d: ((a + c) / 2, (b + d) / 2, c - a, d - b),
    "corners y1, x1, y2, x2": lambda a, b, c, d: (b, a, d, c),
    "x and y swapped": lambda a, b, c, d: (b, a, d - b, c - a),
    "width and height swapped": lambda a, b, c, d: (a, b, d - b, c - a),
    "y from the lower edge": lambda a, b, c, d: (a, HEIGHT - d, c - a, d - b),
    "normalised x, y, width, height": lambda a, b, c, d: (
        a / WIDTH, b / HEIGHT, (c - a) / WIDTH, (d - b) / HEIGHT
    ),
    "normalised centre and size": lambda a, b, c, d: (
        (a + c) / 2 / WIDTH, (b + d) / 2 / HEIGHT, (c - a) / WIDTH, (d - b) / HEIGHT
    ),
    "normalised corners": lambda a, b, c, d: (a / WIDTH, b / HEIGHT, c / WIDTH, d / HEIGHT),
    "percent of the image": lambda a, b, c, d: (
        100 * a / WIDTH, 100 * b / HEIGHT, 100 * (c - a) / WIDTH, 100 * (d - b) / HEIGHT
    ),
    "of the image at 0.5 times its size": lambda a, b, c, d: (
        a / 2, b / 2, (c - a) / 2, (d - b) / 2
    ),
    "displaced": lambda a, b, c, d: (a + 90, b + 70, c - a, d - b),
    "of another object": lambda a, b, c, d: (500, 10, 20, 20),
    "": lambda a, b, c, d: (a - 60, b - 40, c - a + 30, d - b - 30),
}  # fmt: skip


def box_of(bounds: Bounds) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = bounds
    return x1, y1, x2 - x1, y2 - y1


@pytest.mark.parametrize("cause", MISTAKES)
def test_the_likely_cause_is_named(cause: str) -> None:
    box = MISTAKES[cause](*BOUNDS)
    assert not fits(box, BOUNDS)
    assert likely_cause(box, BOUNDS, WIDTH, HEIGHT) == cause


@given(
    st.integers(0, WIDTH - 30), st.integers(0, HEIGHT - 30),
    st.integers(20, 300), st.integers(20, 300), st.tuples(*[st.floats(-7, 7)] * 4),
)  # fmt: skip
def test_boxes_as_annotators_draw_them_fit(
    x: int, y: int, w: int, h: int, moved: tuple[float, ...]
) -> None:
    """COCO's own lie up to 7 pixels beside their masks."""
    bounds = (x, y, x + w, y + h)
    corners = [edge + by for edge, by in zip(bounds, moved, strict=True)]
    assert fits(box_of(corners), bounds)


@given(st.floats(0, 10), st.integers(1, 12), st.integers(1, 12))
def test_small_objects_are_judged_by_pixels(beside: float, w: int, h: int) -> None:
    assert fits((50 + beside, 40 - beside, w, h), (50, 40, 50 + w, 40 + h))


corners = st.tuples(*[st.integers(0, 60)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]) + 1, max(c[1], c[3]) + 1)
)


@given(corners, corners)
def test_iou_equals_torchvisions(a: Bounds, b: Bounds) -> None:
    expected = box_iou(tensor([a]).double(), tensor([b]).double()).item()
    assert iou(a, b) == pytest.approx(expected)
