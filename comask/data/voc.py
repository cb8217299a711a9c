"""Reads Pascal VOC's segmentation data sets, which CVAT also writes as "segmentation mask 1.1".

The format is described at http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. A PNG
in `SegmentationObject` has a colour for each object, one in `SegmentationClass` a colour for each class.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import CocoSource
from comask.data.content import Objects, Size, files_below, read_images, read_list, reason, spelled
from comask.errors import DataError
from comask.media_files import IMAGE_SUFFIXES

# In the order of the colour map, from 1 on.
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOID = 224 << 16 | 224 << 8 | 192  # the colour of pixels of no class: seams between objects
KINDS = ("SegmentationObject", "SegmentationClass")
_MOST_OBJECTS = 1000  # of an image; a picture with more colours is no map of objects
_COLOUR = re.compile(r"(?P<name>.+):(?P<red>\d+),(?P<green>\d+),(?P<blue>\d+)(:.*)?")

Colours = NDArray[np.int32]  # [h, w], red << 16 | green << 8 | blue


def find_voc(folder: Path) -> Mapping[str, Callable[[], CocoSource]]:
    """Returns the parts of a data set in VOC's layout by the names of their lists.

    Without lists, the only part is `all`. A folder in another layout has no parts.
    """
    if not (folder / "JPEGImages").is_dir() or not (folder / KINDS[0]).is_dir():
        return {}
    lists = {file.stem: file for file in (folder / "ImageSets" / "Segmentation").glob("*.txt")}
    if "val" in lists:
        lists.pop("trainval", None)  # its images are those of train and val
    return {name: partial(_read_part, folder, file) for name, file in lists.items()} or {
        "all": partial(_read_part, folder, None)
    }


def _read_part(folder: Path, listed: Path | None) -> CocoSource:
    """Reads the images of a list, or all that have objects."""
    images = folder / "JPEGImages"
    if listed is None:
        found = files_below(folder / KINDS[0], (".png",))
        names = [file.relative_to(folder / KINDS[0]).with_suffix("").as_posix() for file in found]
    else:
        names = read_list(listed)
    known = {
        normalize("NFC", file.relative_to(images).with_suffix("").as_posix()): file
        for file in files_below(images, IMAGE_SUFFIXES)
    }
    files = ((known.get(normalize("NFC", name), images / f"{name}.jpg"), name) for name in names)
    colours = _class_colours(folder)
    ids = {colour: id_ for id_, colour in enumerate(colours, 1)}
    classes = dict(enumerate(colours.values(), 1))
    return read_images(folder, classes, [images], files, partial(_read_objects, folder, ids))


def _class_colours(folder: Path) -> dict[int, str]:
    """Returns the class names by colour: those of CVAT's `labelmap.txt`, or VOC's twenty."""
    file = folder / "labelmap.txt"
    if not file.exists():
        return {_voc_colour(number): name for number, name in enumerate(CLASSES, 1)}
    colours = {}
    for line in read_list(file):
        if line.startswith("#"):
            continue
        if not (found := _COLOUR.fullmatch(line)):
            raise DataError(
                f"{file}: expected lines `name:red,green,blue:parts:actions`, found {shortened(line)}"
            )
        red, green, blue = (int(found[channel]) for channel in ("red", "green", "blue"))
        colours[red << 16 | green << 8 | blue] = found["name"]
    colours.pop(0, None)  # the background
    return colours


def _voc_colour(number: int) -> int:
    """Returns the colour of a class in VOC's colour map, by the formula of its development kit."""
    red = green = blue = 0
    for bit in range(7, -1, -1):
        red |= (number & 1) << bit
        green |= (number >> 1 & 1) << bit
        blue |= (number >> 2 & 1) << bit
        number >>= 3
    return red << 16 | green << 8 | blue


def _read_objects(folder: Path, ids: Mapping[int, int], name: str, size: Size) -> Objects:
    """Reads the objects of an image; one without both PNGs has none, since CVAT writes none for it.

    Raises:
        ValueError: when a PNG cannot be read, or is not of the image's size.
    """
    found = Objects()
    files = [spelled(folder / kind / f"{name}.png") for kind in KINDS]
    if not any(map(os.path.lexists, files)):
        return found
    objects, classes = (_colours(file, size) for file in files)
    listed = [colour for colour in np.unique(objects).tolist() if colour not in (0, VOID)]
    if len(listed) > _MOST_OBJECTS:
        raise ValueError(f"{files[0]}: has {len(listed)} colours; expected one for each object")
    for colour in listed:
        mask = objects == colour
        colours, counts = np.unique(classes[mask], return_counts=True)
        main = int(colours[counts.argmax()])  # the seams of objects may have another colour
        if main in ids:
            found.add_mask(ids[main], mask)
        else:
            found.unreadable.append(
                f"{files[1]}: the object of colour {_text(colour)} has the colour {_text(main)}, which "
                f"is no class's"
            )
    return found


def _text(colour: int) -> str:
    return f"{colour >> 16},{colour >> 8 & 255},{colour & 255}"


def _colours(file: Path, size: Size) -> Colours:
    from PIL import Image

    try:
        with Image.open(file) as image:
            if (width_height := image.size) == size[::-1]:
                pixels = np.asarray(image.convert("RGB"), np.int32)
    # A broken PNG is a SyntaxError.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: not a readable PNG: {reason(error)}") from error
    if width_height != size[::-1]:
        width, height = width_height
        raise ValueError(f"{file}: is {width}x{height} pixels, its image {size[1]}x{size[0]}")
    return np.asarray(pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2])
