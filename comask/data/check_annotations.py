"""Checks annotations, corrects some and leaves out those that cannot be used.

Masks are checked by `read_segmentation`, which also reads them in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from reprlib import repr as shortened
from typing import Any, Literal

from comask.data.problems import Findings, Kind, UnsoundError
from comask.data.source import Id, ImageInfo, InstanceSource
from comask.errors import DataError
from comask.segmentation import read_segmentation

Bounds = Sequence[float]
Corners = tuple[float, float, float, float]

# Annotators round, and draw boxes and outlines separately: some of COCO's boxes are 3 to 7 pixels off.
_PIXELS = 10.0
_LEAST_IOU = 0.6
_SAME = 0.8  # IoU from which another reading of a box's numbers explains a mistake

Annotation = dict[str, Any]
Annotations = list[Annotation]

_MAX_OVERSHOOT = 1.0  # pixels outside the image that are tolerated, since annotation tools round
# At 65536, f32 has steps of 1/128 px. A box that rounding makes empty would have no logarithm.
_MIN_SIDE = 0.01
_NUMBERS = {int, float}
_LARGEST = 1e9  # larger numbers are not coordinates; such integers may not even fit a float


def fits(box: Sequence[float], bounds: Bounds) -> bool:
    """Returns whether a box is close to the bounds of its mask, by distance or by overlap."""
    corners = from_corner(*box)
    distance = max(abs(a - b) for a, b in zip(corners, bounds, strict=True))
    return distance <= _PIXELS or iou(corners, bounds) >= _LEAST_IOU


def likely_cause(box: Sequence[float], bounds: Bounds, width: int, height: int) -> str:
    """Describes what the four numbers of a box seem to be; empty if no usual mistake explains them.

    Args:
        box: the annotated numbers.
        bounds: the mask's bounds.
        width: the image's width in pixels.
        height: the image's height in pixels.
    """
    a, b, c, d = box
    for words, read in _READINGS.items():
        if iou(read(a, b, c, d, width, height), bounds) >= _SAME:
            return words
    x1, y1, x2, y2 = bounds
    scale, corners = (x2 - x1) / c, from_corner(*box)
    if iou([side * scale for side in corners], bounds) >= _SAME:
        return f"of the image at {1 / scale:.2g} times its size"
    if iou((0, 0, c, d), (0, 0, x2 - x1, y2 - y1)) >= _SAME:
        return "displaced"
    return "" if iou(corners, bounds) else "of another object"


def iou(a: Bounds, b: Bounds) -> float:
    """Returns the intersection over union of two boxes, given by their corners."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (sum(areas) - shared)


def from_corner(x: float, y: float, w: float, h: float) -> Corners:
    """Returns (x1, y1, x2, y2) of COCO's box."""
    return x, y, x + w, y + h


def _from_centre(x: float, y: float, w: float, h: float) -> Corners:
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


# Each function takes the four numbers, the image's width and height, and returns the intended corners.
_READINGS: dict[str, Callable[[float, float, float, float, int, int], Corners]] = {
    "corners x1, y1, x2, y2": lambda a, b, c, d, w, h: (a, b, c, d),
    "centre and size": lambda a, b, c, d, w, h: _from_centre(a, b, c, d),
    "corners y1, x1, y2, x2": lambda a, b, c, d, w, h: (b, a, d, c),
    "x and y swapped": lambda a, b, c, d, w, h: from_corner(b, a, d, c),
    "width and height swapped": lambda a, b, c, d, w, h: from_corner(a, b, d, c),
    "y from the lower edge": lambda a, b, c, d, w, h: from_corner(a, h - b - d, c, d),
    "normalised x, y, width, height": lambda a, b, c, d, w, h: from_corner(
        a * w, b * h, c * w, d * h
    ),
    "normalised centre and size": lambda a, b, c, d, w, h: _from_centre(a * w, b * h, c * w, d * h),
    "normalised corners": lambda a, b, c, d, w, h: (a * w, b * h, c * w, d * h),
    "percent of the image": lambda a, b, c, d, w, h: from_corner(
        a * w / 100, b * h / 100, c * w / 100, d * h / 100
    ),
}  # fmt: skip


def changed_annotations(
    source: InstanceSource,
    indices: list[int],
    findings: Findings,
    *,
    boxes: Literal["annotated", "mask"] = "annotated",
) -> dict[int, Annotations]:
    """Returns the corrected annotations, by image index, of the images whose annotations change.

    Args:
        source: the data set.
        indices: the images to check.
        findings: receives the problems.
        boxes: `mask` replaces each box by the bounds of its mask.
    """
    categories = {category.id for category in source.categories}
    changed: dict[int, Annotations] = {}
    first: dict[Any, Annotation] = {}  # by annotation id
    nameless: Annotations = []  # copies, which get new ids
    for index in indices:
        info, annotations = source.info(index), source.annotations(index)
        sound = []
        for annotation in annotations:
            id_ = annotation.get("id")
            name = f"{info.file_name} annotation {shortened(id_)}"
            named = type(id_) in (int, str)
            if named and first.get(id_) == annotation:
                findings[Kind.REPEATED_ANNOTATION].append(name)
                continue
            try:
                kept, corrections = _corrected(annotation, info, categories, boxes)
            except UnsoundError as error:
                findings[error.kind].append(f"{name}{error}")
                continue
            for kind, words in corrections:
                findings[kind].append(f"{name}: {words}")
            # Only their ids are bad; without them, these objects would be trained as background.
            if not named or id_ in first:
                findings[Kind.NO_ID].append(name)
                kept = dict(kept)
                nameless.append(kept)
            else:
                first[id_] = annotation
            sound.append(kept)
        if len(sound) < len(annotations) or any(
            a is not b for a, b in zip(sound, annotations, strict=True)
        ):
            changed[index] = sound
    numbers = [id_ for id_ in first if isinstance(id_, int)]
    for new, annotation in enumerate(nameless, start=max(numbers, default=0) + 1):
        annotation["id"] = new
    return changed


def _corrected(
    annotation: Annotation,
    info: ImageInfo,
    categories: set[Id],
    boxes: Literal["annotated", "mask"],
) -> tuple[Annotation, list[tuple[Kind, str]]]:
    """Returns the annotation, or a corrected copy, and the corrections as (kind, example).

    Raises:
        UnsoundError: when the annotation has to be left out.
    """
    box, category = annotation.get("bbox"), annotation.get("category_id")
    if category is None or (box is None and boxes == "annotated"):
        raise UnsoundError(Kind.NO_FIELD, f": bbox {shortened(box)}, category_id {category}")
    if not isinstance(category, int | float | str) or category not in categories:
        raise UnsoundError(Kind.UNKNOWN_CATEGORY, f": category {shortened(category)}")
    if annotation.get("iscrowd") not in (0, 1, None):
        raise UnsoundError(Kind.BAD_CROWD, f": iscrowd {shortened(annotation['iscrowd'])}")
    changes: Annotation = {}
    problems = []
    segmentation = annotation.get("segmentation")
    sound_segmentation, bounds = _sound_segmentation(segmentation, info)
    x1, y1, x2, y2 = bounds
    if sound_segmentation is not segmentation:
        changes["segmentation"] = sound_segmentation
        problems.append((Kind.SOME_SHORT, shortened(segmentation)))
    if boxes == "mask":
        changes["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    else:
        sound_box = _sound_box(box, info)
        if sound_box is not box:
            changes["bbox"] = sound_box
            problems.append((Kind.CLIPPED, shortened(box)))
        assert box is not None  # checked at the start
        if not fits(box, bounds):
            cause = likely_cause(box, bounds, info.width, info.height)
            spans = f"{shortened(box)}, its mask spans x {x1}..{x2}, y {y1}..{y2}"
            problems.append((Kind.BESIDE_MASK, f"{spans} ({cause}?)" if cause else spans))
    corrected = annotation | changes if changes else annotation
    if not _is_number(annotation.get("area", 0)):
        corrected = {field: value for field, value in corrected.items() if field != "area"}
        problems.append((Kind.BAD_AREA, shortened(annotation["area"])))
    return corrected, problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST  # False for NaN as well


def _sound_box(box: Any, info: ImageInfo) -> Any:
    """Returns the box (x, y, w, h), clipped if it extends too far beyond the image."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
        raise UnsoundError(Kind.BAD_BOX, f": {shortened(box)}")
    x, y, w, h = box
    if min(w, h) < _MIN_SIDE:
        small = " (normalised?)" if min(w, h) > 0 and max(box) <= 1 else ""
        raise UnsoundError(Kind.NO_AREA, f": {box}{small}")
    overshoot = max(-x, -y, x + w - info.width, y + h - info.height)
    left, top = max(x, 0), max(y, 0)
    clipped = [left, top, min(x + w, info.width) - left, min(y + h, info.height) - top]
    if min(clipped[2:]) < _MIN_SIDE:
        raise UnsoundError(Kind.OUTSIDE, f": {box} in {info.width}x{info.height}")
    return clipped if overshoot > _MAX_OVERSHOOT else box


def _sound_segmentation(segmentation: Any, info: ImageInfo) -> tuple[Any, Bounds]:
    """Returns the segmentation without polygons of fewer than 3 points, and the bounds of its mask."""
    if not segmentation:
        raise UnsoundError(Kind.NO_SEGMENTATION, "")
    if isinstance(segmentation, list):
        whole = [part for part in segmentation if not isinstance(part, list) or len(part) >= 6]
        if not whole:
            raise UnsoundError(Kind.ONLY_SHORT, f": {shortened(segmentation)}")
        if len(whole) < len(segmentation):
            return _sound_segmentation(whole, info)
    try:
        bounds = _bounds(segmentation, info)
    # Integers that do not fit a float raise OverflowError.
    except (DataError, ValueError, OverflowError) as error:
        kind = Kind.BAD_RLE if isinstance(segmentation, dict) else Kind.NO_POLYGONS
        raise UnsoundError(kind, f": {error}") from error
    if bounds is None:
        raise UnsoundError(Kind.NO_PIXEL, f": {shortened(segmentation)}")
    return segmentation, bounds


def _bounds(segmentation: Any, info: ImageInfo) -> Bounds | None:
    """Returns (x1, y1, x2, y2) of the mask in pixels, or None if it is empty.

    Raises:
        DataError: when the segmentation is malformed.
    """
    from pycocotools import mask as coco

    if isinstance(segmentation, list) and all(map(_is_plain_polygon, segmentation)):
        # This is the rasteriser that training uses, but it stops at run lengths, which it derives from
        # the outline alone. So pixels cost neither time nor memory.
        boxes = coco.toBbox(coco.frPyObjects(segmentation, info.height, info.width)).tolist()
        corners = [(x, y, x + w, y + h) for x, y, w, h in boxes if w and h]  # 0: no pixel
        if not corners:
            return None
        left, top, right, bottom = zip(*corners, strict=True)
        return int(min(left)), int(min(top)), int(max(right)), int(max(bottom))
    mask = read_segmentation(segmentation, info.height, info.width)
    return mask.bounds if mask.area else None


def _is_plain_polygon(polygon: object) -> bool:
    """Returns whether a polygon is certainly well-formed; `read_segmentation` checks the others."""
    if not isinstance(polygon, list) or len(polygon) % 2 or not {*map(type, polygon)} <= _NUMBERS:
        return False
    if not polygon or min(polygon) < -1e5 or max(polygon) > 1e5:
        return False
    return math.isfinite(sum(polygon))  # min() and max() may overlook NaN
