"""Reads Pascal VOC's segmentation data sets, which CVAT also writes as "segmentation mask 1.1".

The format is described at http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. A PNG
in `SegmentationObject` has a colour for each object, one in `SegmentationClass` a colour for each class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import CocoSource
from comask.data.content import Content, files_with_sizes
from comask.errors import DataError, one_line
from comask.media_files import IMAGE_SUFFIXES

# In the order of the colour map, from 1 on.
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOID = (
    224 << 16 | 224 << 8 | 192
)  # the colour of pixels that belong to no class: seams between objects
_THREADS = 8
_LISTS = {"train": ("train", "trainval"), "val": ("val", "test")}

Colours = NDArray[np.int64]  # [h, w], red << 16 | green << 8 | blue


def find_voc(folder: Path) -> Mapping[str, Callable[[], CocoSource]]:
    """Returns the parts of a data set in VOC's layout; `all` without lists, nothing in another layout."""
    images, objects = folder / "JPEGImages", folder / "SegmentationObject"
    if not images.is_dir() or not objects.is_dir():
        return {}
    lists = folder / "ImageSets" / "Segmentation"
    parts = {}
    for part, names in _LISTS.items():
        file = next((f for name in names if (f := lists / f"{name}.txt").is_file()), None)
        if file is not None:
            parts[part] = partial(_read_part, folder, file)
    listed = sorted(lists.glob("*.txt"))
    if not parts and len(listed) == 1:  # CVAT's default.txt
        return {"all": partial(_read_part, folder, listed[0])}
    return parts or {"all": partial(_read_part, folder, None)}


def _read_part(folder: Path, listed: Path | None) -> CocoSource:
    """Reads the images of a list, or all that have objects."""
    colours = _class_colours(folder)
    names = _names(folder, listed)
    known = _images_by_name(folder / "JPEGImages")
    images = [known.get(name, folder / "JPEGImages" / f"{name}.jpg") for name in names]
    data = Content(dict(enumerate(colours.values(), 1)))
    ids = {colour: id_ for id_, colour in enumerate(colours, 1)}
    with ThreadPoolExecutor(_THREADS) as pool:
        masks = pool.map(partial(_masks, folder), names)
        for (image, size), name, mask in zip(files_with_sizes(images), names, masks, strict=True):
            image_id = data.add_image(image, size)
            try:
                for category, pixels in _objects(mask, size, ids):
                    data.add_mask(image_id, category, pixels)
            except ValueError as error:
                data.unreadable.append(f"{folder / 'SegmentationObject' / name}.png: {error}")
                data.drop_image()
    return data.source()


def _names(folder: Path, listed: Path | None) -> list[str]:
    if listed is None:
        return sorted(file.stem for file in (folder / "SegmentationObject").glob("*.png"))
    try:
        lines = listed.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{listed}: not a readable list of images: {one_line(error)}") from error
    return [line.strip() for line in lines if line.strip()]


def _images_by_name(folder: Path) -> dict[str, Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(files)}


def _class_colours(folder: Path) -> dict[int, str]:
    """Returns the class names by colour: those of CVAT's `labelmap.txt`, or VOC's twenty."""
    file = folder / "labelmap.txt"
    if not file.is_file():
        return {_voc_colour(number): name for number, name in enumerate(CLASSES, 1)}
    colours = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                name, colour, *_ = line.split(":")
                red, green, blue = map(int, colour.split(","))
                colours[red << 16 | green << 8 | blue] = name
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: expected lines `name:red,green,blue:parts:actions`: {one_line(error)}"
        ) from error
    colours.pop(0, None)  # the background
    return colours


def _voc_colour(number: int) -> int:
    """Returns the colour of a class in VOC's colour map, by the formula of its development kit."""
    red = green = blue = 0
    for bit in range(8):
        red |= (number >> 0 & 1) << 7 - bit
        green |= (number >> 1 & 1) << 7 - bit
        blue |= (number >> 2 & 1) << 7 - bit
        number >>= 3
    return red << 16 | green << 8 | blue


def _masks(folder: Path, name: str) -> tuple[Colours, Colours] | str:
    """Returns the colours of an image's objects and classes, or why they cannot be read."""
    try:
        objects, classes = (
            _colours(folder / kind / f"{name}.png")
            for kind in ("SegmentationObject", "SegmentationClass")
        )
    except (OSError, ValueError, SyntaxError) as error:  # a broken PNG is a SyntaxError
        return one_line(error)
    return objects, classes


def _colours(file: Path) -> Colours:
    from PIL import Image

    with Image.open(file) as image:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int64), 2, 0)
    return np.asarray(red << 16 | green << 8 | blue)


def _objects(
    masks: tuple[Colours, Colours] | str, size: tuple[int, int], ids: Mapping[int, int]
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yields the class's id and the mask of each object.

    Raises:
        ValueError: when the masks cannot be read or are not of the image's size.
    """
    if isinstance(masks, str):
        raise ValueError(masks)
    objects, classes = masks
    for mask in masks:
        if mask.shape != size:
            height, width = mask.shape
            raise ValueError(f"is {width}x{height} pixels, its image {size[1]}x{size[0]}")
    for colour in np.unique(objects):
        if colour in (0, VOID):
            continue
        pixels = objects == colour
        found, counts = np.unique(classes[pixels], return_counts=True)
        main = int(found[counts.argmax()])  # the seams of objects may have another colour
        if main not in ids:
            red, green, blue = main >> 16, main >> 8 & 255, main & 255
            raise ValueError(f"an object has the colour {red},{green},{blue}, which is no class's")
        yield ids[main], pixels
