"""Which annotations of a data set are sound, and those that can be mended.

Masks are judged by `read_segmentation`, which will read them again in training.
"""

from __future__ import annotations

from reprlib import repr as shortened
from typing import Any

from comask.data.problems import Findings, Kind, UnsoundError
from comask.data.source import ImageInfo, InstanceSource
from comask.errors import DataError
from comask.segmentation import read_segmentation

Annotation = dict[str, Any]
Annotations = list[Annotation]

_MAX_OVERSHOOT = 1.0  # pixels outside the image; annotators' tools round
# f32 tells coordinates apart by 1/128 px at 65536; a box that it makes empty has no logarithm.
_MIN_SIDE = 0.01
_NUMBERS = {int, float}
_LARGEST = 1e9  # anything beyond is no coordinate; such integers may not even fit a float


def changed_annotations(
    source: InstanceSource, indices: list[int], findings: Findings
) -> dict[int, Annotations]:
    """The annotations of those images that have unsound ones, without these; by image index."""
    categories = {category.id for category in source.categories}
    changed: dict[int, Annotations] = {}
    first: dict[int, Annotation] = {}  # by annotation id
    nameless: Annotations = []  # our copies
    for index in indices:
        info, found = source.info(index), source.annotations(index)
        sound = []
        for annotation in found:
            id_ = annotation.get("id")
            name = f"{info.file_name} annotation {shortened(id_)}"
            if isinstance(id_, int) and first.get(id_) == annotation:
                findings[Kind.REPEATED_ANNOTATION].append(name)
                continue
            try:
                kept, mended_fields = _mended(annotation, info, categories)
            except UnsoundError as error:
                findings[error.kind].append(f"{name}{error}")
                continue
            for kind, field in mended_fields:
                findings[kind].append(f"{name}: {shortened(annotation[field])}")
            # Left out, such objects would be taken for background, and only their ids are bad.
            if not isinstance(id_, int) or id_ in first:
                findings[Kind.NO_ID].append(name)
                kept = dict(kept)
                nameless.append(kept)
            else:
                first[id_] = annotation
            sound.append(kept)
        if len(sound) < len(found) or any(a is not b for a, b in zip(sound, found, strict=True)):
            changed[index] = sound
    for new, annotation in enumerate(nameless, start=max(first, default=0) + 1):
        annotation["id"] = new
    return changed


def _mended(
    annotation: Annotation, info: ImageInfo, categories: set[int]
) -> tuple[Annotation, list[tuple[Kind, str]]]:
    """The annotation, or a copy where something could be mended; and what it was, in which field.

    Raises:
        UnsoundError: when it has to be left out.
    """
    box, category = annotation.get("bbox"), annotation.get("category_id")
    if box is None or category is None:
        raise UnsoundError(Kind.NO_FIELD, f": bbox {shortened(box)}, category_id {category}")
    if not isinstance(category, int | float) or category not in categories:
        raise UnsoundError(Kind.UNKNOWN_CATEGORY, f": category {shortened(category)}")
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise UnsoundError(Kind.BAD_CROWD, f": iscrowd {shortened(annotation['iscrowd'])}")
    mended, problems = annotation, []
    if (sound_box := _sound_box(box, info)) is not box:
        mended = mended | {"bbox": sound_box}
        problems.append((Kind.CLIPPED, "bbox"))
    segmentation = annotation.get("segmentation")
    if (sound_segmentation := _sound_segmentation(segmentation, info)) is not segmentation:
        mended = mended | {"segmentation": sound_segmentation}
        problems.append((Kind.SOME_SHORT, "segmentation"))
    if not _is_number(annotation.get("area", 0)):
        mended = {field: value for field, value in mended.items() if field != "area"}
        problems.append((Kind.BAD_AREA, "area"))
    return mended, problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST  # false for NaN as well


def _sound_box(box: Any, info: ImageInfo) -> Any:
    """The box (x, y, w, h), clipped where it is too far outside the image."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
        raise UnsoundError(Kind.NO_AREA, f": {shortened(box)}")
    x, y, w, h = box
    if min(w, h) < _MIN_SIDE:
        raise UnsoundError(Kind.NO_AREA, f": {box}")
    overshoot = max(-x, -y, x + w - info.width, y + h - info.height)
    left, top = max(x, 0), max(y, 0)
    clipped = [left, top, min(x + w, info.width) - left, min(y + h, info.height) - top]
    if min(clipped[2:]) < _MIN_SIDE:
        raise UnsoundError(Kind.OUTSIDE, f": {box} in {info.width}x{info.height}")
    return clipped if overshoot > _MAX_OVERSHOOT else box


def _sound_segmentation(segmentation: Any, info: ImageInfo) -> Any:
    """The segmentation, without its polygons of fewer than 3 points."""
    if not segmentation:
        raise UnsoundError(Kind.NO_SEGMENTATION, "")
    if isinstance(segmentation, list):
        whole = [part for part in segmentation if not isinstance(part, list) or len(part) >= 6]
        if not whole:
            raise UnsoundError(Kind.ONLY_SHORT, f": {shortened(segmentation)}")
        if len(whole) < len(segmentation):
            return _sound_segmentation(whole, info)
    try:
        if _has_pixels(segmentation, info):
            return segmentation
    # OverflowError: of integers that do not fit a float
    except (DataError, ValueError, OverflowError) as error:
        kind = Kind.BAD_RLE if isinstance(segmentation, dict) else Kind.NO_POLYGONS
        raise UnsoundError(kind, f": {error}") from error
    raise UnsoundError(Kind.NO_PIXEL, f": {shortened(segmentation)}")


def _has_pixels(segmentation: Any, info: ImageInfo) -> bool:
    """Whether the mask is not empty.

    Raises:
        DataError: when the segmentation is malformed.
    """
    from pycocotools import mask as coco

    if isinstance(segmentation, list) and all(map(_is_plain_polygon, segmentation)):
        # The same rasteriser as training's, but only as far as run lengths, which it makes of the
        # outline alone: no time and memory go into pixels. A union is empty if all its parts are.
        return bool(coco.area(coco.frPyObjects(segmentation, info.height, info.width)).any())
    return read_segmentation(segmentation, info.height, info.width).area > 0


def _is_plain_polygon(polygon: object) -> bool:
    """Whether a polygon is surely well-formed; if not, `read_segmentation` judges it."""
    if not isinstance(polygon, list) or len(polygon) % 2 or not {*map(type, polygon)} <= _NUMBERS:
        return False
    return all(-1e5 <= number <= 1e5 for number in polygon)  # false for NaN as well
