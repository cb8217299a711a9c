"""Draws the annotations of a data set that are most worth a look, for the page of `comask check`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np
from numpy.typing import NDArray

from comask.data.check_annotations import from_corner
from comask.data.source import ImageInfo, InstanceSource
from comask.data.survey import Annotation, Place, Survey
from comask.draw import class_color
from comask.errors import ImageError, one_line
from comask.segmentation import RunLengthMask, read_segmentation

_SIDE = 420  # a picture's longer side in pixels
_MOST_ZOOM = 8
_CONTEXT, _LEAST_CONTEXT = 5, 40  # around a small object: in sides of it, and in pixels
_TINT = 0.3  # opacity of masks
_EDGE = (0, 0, 0)  # beside each line, so that it shows on a background of its colour
_QUALITY = 85

Window = tuple[int, int, int, int]  # the part of an image that is drawn: x1, y1, x2, y2


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A part of an image with some of its annotations.

    Attributes:
        title: the reason to look at it.
        caption: the file, and what is drawn.
        jpeg: the encoded picture.
    """

    title: str
    caption: str
    jpeg: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """What a picture is to show: annotations of one image, or with `near` the first one enlarged."""

    title: str
    text: str
    image: int
    numbers: list[int]
    near: bool = False


def worst_cases(source: InstanceSource, survey: Survey) -> list[Picture]:
    """Draws up to 12 pictures; images that cannot be decoded are passed over.

    Args:
        source: the data set, which `open_source` has checked.
        survey: its measures.
    """
    order = np.argsort(survey.sides, kind="stable").tolist()
    busiest = np.argsort(-survey.per_image, kind="stable").tolist()
    beside = sorted(survey.beside, key=lambda case: case[1])
    crowds = sorted(survey.crowds, key=lambda case: -case[1])
    groups = (
        (3, (_beside(source, place) for place, _ in beside)),
        (3, (_single(title, example, place) for place, title, example in survey.changed)),
        (2, (_sized(source, survey, number, "among the smallest objects") for number in order)),
        (1, (_sized(source, survey, number, "the largest object") for number in order[::-1])),
        (2, (_busy(source, index) for index in busiest if survey.per_image[index])),
        (1, (_single("the largest crowd", _named(source, place), place) for place, _ in crowds)),
    )
    return [p for count, cases in groups for p in islice(_pictures(source, cases), count)]


def _single(title: str, text: str, place: Place) -> _Case:
    return _Case(title=title, text=text, image=place.image, numbers=[place.number])


def _beside(source: InstanceSource, place: Place) -> _Case:
    annotation = _annotation(source, place)
    x1, y1, x2, y2 = _mask(annotation, source.info(place.image)).bounds
    box = ", ".join(f"{side:g}" for side in annotation["bbox"])
    text = f"{_named(source, place)}: box [{box}], mask x {x1}..{x2}, y {y1}..{y2}"
    return _single("box far from its mask", text, place)


def _sized(source: InstanceSource, survey: Survey, number: int, title: str) -> _Case:
    place = survey.objects[number]
    text = f"{_named(source, place)}, {survey.sides[number] ** 2:,.0f} pixels"
    return _Case(title=title, text=text, image=place.image, numbers=[place.number], near=True)


def _busy(source: InstanceSource, index: int) -> _Case:
    annotations = source.annotations(index)
    numbers = [n for n, annotation in enumerate(annotations) if not annotation.get("iscrowd")]
    text = f"{source.info(index).file_name}: {len(numbers)} objects"
    return _Case(title="among the images of most objects", text=text, image=index, numbers=numbers)


def _annotation(source: InstanceSource, place: Place) -> Annotation:
    return source.annotations(place.image)[place.number]


def _named(source: InstanceSource, place: Place) -> str:
    """Returns file and class of an annotation."""
    id_ = _annotation(source, place)["category_id"]
    (name,) = (category.name for category in source.categories if category.id == id_)
    return f"{source.info(place.image).file_name}: {name}"


def _mask(annotation: Annotation, info: ImageInfo) -> RunLengthMask:
    return read_segmentation(annotation["segmentation"], info.height, info.width)


def _pictures(source: InstanceSource, cases: Iterable[_Case]) -> Iterator[Picture]:
    """Yields the pictures of those cases whose images can be decoded."""
    for case in cases:
        try:
            pixels = source.image(case.image)
        except ImageError:
            continue
        jpeg = _encoded(_drawn(source, case, pixels))
        yield Picture(title=case.title, caption=one_line(case.text), jpeg=jpeg)


def _drawn(source: InstanceSource, case: _Case, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draws boxes, masks and their outlines after scaling, so that all lines are equally wide."""
    annotations, info = source.annotations(case.image), source.info(case.image)
    chosen = [annotations[number] for number in case.numbers]
    x1, y1, x2, y2 = _around(_mask(chosen[0], info).bounds, info) if case.near else (
        0, 0, info.width, info.height
    )  # fmt: skip
    scale = min(_SIDE / max(x2 - x1, y2 - y1), _MOST_ZOOM)
    size = max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    canvas = np.array(cv2.resize(pixels[y1:y2, x1:x2], size, interpolation=method), np.uint8)
    labels = {category.id: label for label, category in enumerate(source.categories)}
    for annotation in chosen:
        color = class_color(labels[annotation["category_id"]])
        part = _mask(annotation, info).part(x1, y1, x2, y2).view(np.uint8)
        mask = cv2.resize(part, size, interpolation=cv2.INTER_NEAREST_EXACT)
        tinted = cv2.addWeighted(canvas, 1 - _TINT, np.full_like(canvas, color), _TINT, 0)
        np.copyto(canvas, tinted, where=mask.astype(bool)[..., None])
        outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        left, top, right, bottom = (
            round((side - start) * scale)
            for side, start in zip(from_corner(*annotation["bbox"]), (x1, y1, x1, y1), strict=True)
        )
        for ink, line in ((_EDGE, 4), (color, 2)):
            cv2.drawContours(canvas, outlines, -1, ink, line)
            cv2.rectangle(canvas, (left, top), (right - 1, bottom - 1), ink, line)
    return canvas


def _around(bounds: tuple[int, int, int, int], info: ImageInfo) -> Window:
    """Returns the part of an image that shows an object with what surrounds it."""
    x1, y1, x2, y2 = bounds
    side = max(_LEAST_CONTEXT, _CONTEXT * max(x2 - x1, y2 - y1))
    left, right = _span((x1 + x2) // 2, side, info.width)
    top, bottom = _span((y1 + y2) // 2, side, info.height)
    return left, top, right, bottom


def _span(middle: int, side: int, length: int) -> tuple[int, int]:
    """Returns start and end of a range of this length around a place, as far as it fits."""
    start = max(0, min(middle - side // 2, length - side))
    return start, min(start + side, length)


def _encoded(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=_QUALITY, subsampling=0)
    return content.getvalue()
