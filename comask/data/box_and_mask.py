"""Whether an annotation's box fits its mask, and what is likely wrong where it does not.

Boxes are (x, y, w, h), bounds (x1, y1, x2, y2), all in pixels of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Bounds = Sequence[float]

# Annotators round, and draw boxes apart from outlines: some of COCO's boxes lie 3 to 7 pixels beside.
_PIXELS = 10.0
_LEAST_IOU = 0.6
_SAME = 0.8  # IoU from which a changed reading of the box explains it


def fits(box: Sequence[float], bounds: Bounds) -> bool:
    """Whether a box is close to the bounds of its mask, by pixels or by overlap."""
    x, y, w, h = box
    corners = (x, y, x + w, y + h)
    beside = max(abs(a - b) for a, b in zip(corners, bounds, strict=True))
    return beside <= _PIXELS or iou(corners, bounds) >= _LEAST_IOU


def likely_cause(box: Sequence[float], bounds: Bounds, width: int, height: int) -> str:
    """What the four numbers seem to be, in words; empty where no usual mistake explains them.

    Args:
        box: as annotated.
        bounds: of the mask.
        width: of the image in pixels.
        height: of the image in pixels.
    """
    for words, read in _READINGS.items():
        a, b, c, d = box
        if iou(read(a, b, c, d, width, height), bounds) >= _SAME:
            return words
    x, y, w, h = box
    x1, y1, x2, y2 = bounds
    scale = (x2 - x1) / w
    if iou((x * scale, y * scale, (x + w) * scale, (y + h) * scale), bounds) >= _SAME:
        return f"of the image at {1 / scale:.2g} times its size"
    if iou((0, 0, w, h), (0, 0, x2 - x1, y2 - y1)) >= _SAME:
        return "displaced"
    return "" if iou((x, y, x + w, y + h), bounds) else "of another object"


def iou(a: Bounds, b: Bounds) -> float:
    """Intersection over union of two boxes given by their corners."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (sum(areas) - shared)


Reading = Callable[[float, float, float, float, int, int], tuple[float, float, float, float]]


def _centre(a: float, b: float, c: float, d: float) -> tuple[float, float, float, float]:
    return a - c / 2, b - d / 2, a + c / 2, b + d / 2


# Each takes the four numbers, width and height of the image, and gives the corners that were meant.
_READINGS: dict[str, Reading] = {
    "corners x1, y1, x2, y2": lambda a, b, c, d, w, h: (a, b, c, d),
    "centre and size": lambda a, b, c, d, w, h: _centre(a, b, c, d),
    "corners y1, x1, y2, x2": lambda a, b, c, d, w, h: (b, a, d, c),
    "x and y swapped": lambda a, b, c, d, w, h: (b, a, b + d, a + c),
    "width and height swapped": lambda a, b, c, d, w, h: (a, b, a + d, b + c),
    "y from the lower edge": lambda a, b, c, d, w, h: (a, h - b - d, a + c, h - b),
    "normalised x, y, width, height": lambda a, b, c, d, w, h: (
        a * w, b * h, (a + c) * w, (b + d) * h
    ),
    "normalised centre and size": lambda a, b, c, d, w, h: _centre(a * w, b * h, c * w, d * h),
    "normalised corners": lambda a, b, c, d, w, h: (a * w, b * h, c * w, d * h),
    "percent of the image": lambda a, b, c, d, w, h: (
        a * w / 100, b * h / 100, (a + c) * w / 100, (b + d) * h / 100
    ),
}  # fmt: skip
