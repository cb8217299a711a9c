"""What is wrong with a data set, found before training instead of hours into it.

Whatever `sound_part` lets through, training and evaluation can use. Masks are judged by
`mask_from_segmentation`, which will read them again then.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from comask.data.source import ImageInfo, InstanceSource
from comask.errors import DataError
from comask.masks import mask_from_segmentation
from comask.preprocess import FORMATS

Annotation = dict[str, Any]
Annotations = list[Annotation]

EXAMPLES = 3  # of each kind of problem
_THREADS = 16  # reading headers is waiting for the disk
_MAX_OVERSHOOT = 1.0  # pixels outside the image; annotators' tools round
# f32 tells coordinates apart by 1/128 px at 65536; a box that it makes empty has no logarithm.
_MIN_SIDE = 0.01
_NUMBERS = {int, float}
_LARGEST = 1e9  # anything beyond is no coordinate; such integers may not even fit a float
_TRANSPOSING = {5, 6, 7, 8}  # values of EXIF's orientation that swap width and height


class _Kind(Enum):
    """Every kind of problem and its consequence, in the order of the report."""

    NO_SIZE = "images annotated with a side below 1 pixel", "left out"
    SHARED_ID = "images sharing an id with a different one", "all left out"
    REPEATED_IMAGE = "images listed again", "left out"
    NO_FILE = "images without a file", "left out"
    BAD_HEADER = "images with an unreadable header", "left out"
    OTHER_SIZE = "images of another size than annotated", "left out"
    UNKNOWN_IMAGE = "annotations of unknown images", "left out"
    REPEATED_ANNOTATION = "annotations listed again", "left out"
    NO_FIELD = "annotations without bbox or category_id", "left out"
    UNKNOWN_CATEGORY = "annotations of unknown categories", "left out"
    BAD_CROWD = "annotations with an iscrowd other than 0 and 1", "left out"
    NO_AREA = "boxes without area", "left out"
    OUTSIDE = "boxes outside the image", "left out"
    NO_SEGMENTATION = "annotations without segmentation", "left out"
    ONLY_SHORT = "annotations with only polygons of fewer than 3 points", "left out"
    NO_POLYGONS = "segmentations neither polygons nor RLE", "left out"
    BAD_RLE = "masks in RLE that cannot be of the image", "left out"
    NO_PIXEL = "masks without a pixel", "left out"
    CLIPPED = "boxes partly outside the image", "clipped"
    SOME_SHORT = "annotations with a polygon of fewer than 3 points", "polygon left out"
    BAD_AREA = "annotations with an area that is no number", "area ignored"
    NO_ID = "annotations without a unique id", "given a new one"


Findings = dict[_Kind, list[str]]  # examples of each kind, all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One kind of problem of a data set.

    Attributes:
        kind: what is wrong, in the plural, as in "boxes without area".
        count: how often.
        examples: the first 3, naming the file, the annotation's id and the values.
        consequence: what was done about it, as in "left out" or "clipped".
    """

    kind: str
    count: int
    examples: tuple[str, ...]
    consequence: str


def describe(problems: list[Problem]) -> list[str]:
    """One line a problem: `data: 9 boxes without area (left out): 1.jpg annotation 7: …, …`."""
    lines = []
    for problem in problems:
        noun, rest = problem.kind.split(" ", 1)
        if problem.count == 1:
            noun = "box" if noun == "boxes" else noun.removesuffix("s")
        examples = [*problem.examples, "…"] if problem.count > EXAMPLES else problem.examples
        head = f"data: {problem.count} {noun} {rest} ({problem.consequence})"
        lines.append(f"{head}: {', '.join(examples)}")
    return lines


def sound_part(source: InstanceSource) -> tuple[InstanceSource, list[Problem]]:
    """What training can use of a data set, and what is wrong with the rest.

    Files are looked at where the source has them, that is, a method `path(index)`; only their headers
    are read. Annotations of images that are left out go with them and are not counted.

    Args:
        source: the data set; read whole, but for its pixels.

    Returns:
        A view without the unsound images and annotations, in which boxes are clipped, polygons of
        fewer than 3 points left out, and ids unique; then the problems in a fixed order. A source
        without problems is returned itself.

    Raises:
        DataError: when no image is left.
    """
    findings: Findings = {kind: [] for kind in _Kind}
    indices = _sound_images(source, findings)
    if isinstance(source, _FileSource):
        indices = _with_sound_files(source, indices, findings)
    if isinstance(source, _StraySource):
        for stray in source.stray_annotations:
            id_, image = shortened(stray.get("id")), shortened(stray.get("image_id"))
            findings[_Kind.UNKNOWN_IMAGE].append(f"annotation {id_}: image {image}")
    changed = _changed_annotations(source, indices, findings)
    problems = [
        Problem(
            kind=kind.value[0],
            count=len(found),
            examples=tuple(" ".join(example.split()) for example in found[:EXAMPLES]),
            consequence=kind.value[1],
        )
        for kind, found in findings.items()
        if found
    ]
    if not indices:
        why = "; ".join(line.removeprefix("data: ") for line in describe(problems))
        raise DataError(
            f"no image of the data set can be used; check that its annotation file and image folder "
            f"belong together ({why or 'it lists none'})"
        )
    if not problems:
        return source, []
    if isinstance(source, _FileSource):
        return _SoundFiles(source, indices, changed), problems
    return _SoundPart(source, indices, changed), problems


@runtime_checkable
class _FileSource(InstanceSource, Protocol):
    """A source whose images are files."""

    def path(self, index: int) -> Path:
        """Where image `index` lies."""


@runtime_checkable
class _StraySource(Protocol):
    """A source that knows of annotations that belong to none of its images."""

    stray_annotations: Annotations


class _SoundPart:
    """Some images of a source, with other annotations where some were mended or left out."""

    def __init__(
        self, source: InstanceSource, indices: list[int], changed: dict[int, Annotations]
    ) -> None:
        self.categories = source.categories
        self._source, self._indices, self._changed = source, indices, changed

    def __len__(self) -> int:
        return len(self._indices)

    def info(self, index: int) -> ImageInfo:
        return self._source.info(self._indices[index])

    def image(self, index: int) -> NDArray[np.uint8]:
        return self._source.image(self._indices[index])

    def annotations(self, index: int) -> Annotations:
        original = self._indices[index]
        found = self._changed.get(original)
        return self._source.annotations(original) if found is None else found


class _SoundFiles(_SoundPart):
    """The same of files."""

    _source: _FileSource

    def path(self, index: int) -> Path:
        return self._source.path(self._indices[index])


class _UnsoundError(Exception):
    """An image or annotation that has to be left out."""

    def __init__(self, kind: _Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def _sound_images(source: InstanceSource, findings: Findings) -> list[int]:
    """Indices of the images whose entries are sound, whatever their files."""
    infos = [source.info(index) for index in range(len(source))]
    first: dict[int, ImageInfo] = {}
    # Nobody knows to which of them the annotations belong.
    ambiguous = {info.id for info in infos if first.setdefault(info.id, info) != info}
    seen: set[int] = set()
    sound = []
    for index, info in enumerate(infos):
        if min(info.height, info.width) < 1:
            findings[_Kind.NO_SIZE].append(f"{info.file_name}: {info.width}x{info.height}")
        elif info.id in ambiguous:
            findings[_Kind.SHARED_ID].append(f"{info.file_name}: id {info.id}")
        elif info.id in seen:
            findings[_Kind.REPEATED_IMAGE].append(f"{info.file_name}: id {info.id}")
        else:
            seen.add(info.id)
            sound.append(index)
    return sound


def _with_sound_files(source: _FileSource, indices: list[int], findings: Findings) -> list[int]:
    """Those of the images whose file is there and has the annotated size."""
    from PIL import Image

    def look(index: int) -> tuple[_Kind, str] | None:
        return _file_problem(source.path(index), source.info(index))

    # Around all threads, since filters belong to the process. Pillow warns of much that it can read.
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        problems = list(pool.map(look, indices))
    sound = []
    for index, problem in zip(indices, problems, strict=True):
        if problem is None:
            sound.append(index)
        else:
            findings[problem[0]].append(f"{source.info(index).file_name}{problem[1]}")
    return sound


def _file_problem(path: Path, info: ImageInfo) -> tuple[_Kind, str] | None:
    """What `decode_image` would find wrong, or a size that differs from the entry's."""
    from PIL import ExifTags, Image
    from PIL.TiffImagePlugin import TiffImageFile

    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if isinstance(image, TiffImageFile):  # newer versions of Pillow have turned its size
                width, height = image.tag_v2[256], image.tag_v2[257]
            # The base class's method: that of PNG decodes the image to look for EXIF behind it.
            exif = Image.Image.getexif(image)
    except (FileNotFoundError, NotADirectoryError):
        return _Kind.NO_FILE, ""
    # Pillow raises many kinds on broken data, SyntaxError and struct.error among them.
    except Exception as error:
        return _Kind.BAD_HEADER, f": {error}"
    if exif.get(ExifTags.Base.Orientation) in _TRANSPOSING:
        width, height = height, width
    if (width, height) != (info.width, info.height):
        return _Kind.OTHER_SIZE, f": {width}x{height}, annotated {info.width}x{info.height}"
    return None


def _changed_annotations(
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
                findings[_Kind.REPEATED_ANNOTATION].append(name)
                continue
            try:
                kept, mended_fields = _mended(annotation, info, categories)
            except _UnsoundError as error:
                findings[error.kind].append(f"{name}{error}")
                continue
            for kind, field in mended_fields:
                findings[kind].append(f"{name}: {shortened(annotation[field])}")
            # Left out, such objects would be taken for background, and only their ids are bad.
            if not isinstance(id_, int) or id_ in first:
                findings[_Kind.NO_ID].append(name)
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
) -> tuple[Annotation, list[tuple[_Kind, str]]]:
    """The annotation, or a copy where something could be mended; and what it was, in which field.

    Raises:
        _UnsoundError: when it has to be left out.
    """
    box, category = annotation.get("bbox"), annotation.get("category_id")
    if box is None or category is None:
        raise _UnsoundError(_Kind.NO_FIELD, f": bbox {shortened(box)}, category_id {category}")
    if not isinstance(category, int | float) or category not in categories:
        raise _UnsoundError(_Kind.UNKNOWN_CATEGORY, f": category {shortened(category)}")
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise _UnsoundError(_Kind.BAD_CROWD, f": iscrowd {shortened(annotation['iscrowd'])}")
    mended, problems = annotation, []
    if (sound_box := _sound_box(box, info)) is not box:
        mended = mended | {"bbox": sound_box}
        problems.append((_Kind.CLIPPED, "bbox"))
    segmentation = annotation.get("segmentation")
    if (sound_segmentation := _sound_segmentation(segmentation, info)) is not segmentation:
        mended = mended | {"segmentation": sound_segmentation}
        problems.append((_Kind.SOME_SHORT, "segmentation"))
    if not _is_number(annotation.get("area", 0)):
        mended = {field: value for field, value in mended.items() if field != "area"}
        problems.append((_Kind.BAD_AREA, "area"))
    return mended, problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST  # false for NaN as well


def _sound_box(box: Any, info: ImageInfo) -> Any:
    """The box (x, y, w, h), clipped where it is too far outside the image."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
        raise _UnsoundError(_Kind.NO_AREA, f": {shortened(box)}")
    x, y, w, h = box
    if min(w, h) < _MIN_SIDE:
        raise _UnsoundError(_Kind.NO_AREA, f": {box}")
    overshoot = max(-x, -y, x + w - info.width, y + h - info.height)
    left, top = max(x, 0), max(y, 0)
    clipped = [left, top, min(x + w, info.width) - left, min(y + h, info.height) - top]
    if min(clipped[2:]) < _MIN_SIDE:
        raise _UnsoundError(_Kind.OUTSIDE, f": {box} in {info.width}x{info.height}")
    return clipped if overshoot > _MAX_OVERSHOOT else box


def _sound_segmentation(segmentation: Any, info: ImageInfo) -> Any:
    """The segmentation, without its polygons of fewer than 3 points."""
    if not segmentation:
        raise _UnsoundError(_Kind.NO_SEGMENTATION, "")
    if isinstance(segmentation, list):
        whole = [part for part in segmentation if not isinstance(part, list) or len(part) >= 6]
        if not whole:
            raise _UnsoundError(_Kind.ONLY_SHORT, f": {shortened(segmentation)}")
        if len(whole) < len(segmentation):
            return _sound_segmentation(whole, info)
    try:
        if _has_pixels(segmentation, info):
            return segmentation
    # OverflowError: of integers that do not fit a float
    except (DataError, ValueError, OverflowError) as error:
        kind = _Kind.BAD_RLE if isinstance(segmentation, dict) else _Kind.NO_POLYGONS
        raise _UnsoundError(kind, f": {error}") from error
    raise _UnsoundError(_Kind.NO_PIXEL, f": {shortened(segmentation)}")


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
    return bool(mask_from_segmentation(segmentation, info.height, info.width).any())


def _is_plain_polygon(polygon: object) -> bool:
    """Whether a polygon is surely well-formed; if not, `mask_from_segmentation` judges it."""
    if not isinstance(polygon, list) or len(polygon) % 2 or not {*map(type, polygon)} <= _NUMBERS:
        return False
    return all(-1e5 <= number <= 1e5 for number in polygon)  # false for NaN as well
