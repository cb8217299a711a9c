"""Reads LabelMe's data sets: a JSON file for each image, with polygons and other shapes.

The format is that of https://github.com/wkentaro/labelme. Shapes of one label and one `group_id` are
parts of one object.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import CocoSource
from comask.data.content import Objects, Size, files_below, read_images, reason
from comask.errors import DataError
from comask.files import parse_json

# Labels that LabelMe's own converters leave out.
NO_CLASS = ("__ignore__", "_background_")
_CORNERS_OF_CIRCLE = 64
_THREADS = 16
_TRIED = 20  # JSON files by which a folder is recognised; a few may be others

Entry = dict[str, Any]


def holds_labelme(folder: Path) -> bool:
    """Returns whether one of the first JSON files of a folder is LabelMe's."""
    return any(isinstance(_read(file), dict) for file in islice(_files(folder), _TRIED))


def read_labelme(folder: Path, root: Path) -> CocoSource:
    """Reads the JSON files of a folder; the images must lie in `root`.

    Raises:
        DataError: when there is no object, or when all images lie elsewhere.
    """
    files = list(_files(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(zip(files, pool.map(_read, files), strict=True))
    read = [(file, entry) for file, entry in entries if isinstance(entry, dict)]
    labels = {shape["label"] for _, entry in read for shape in entry["shapes"]}
    names = sorted(labels - {*NO_CLASS})
    if not names:
        raise DataError(f"{folder}: LabelMe's JSON files have no shapes; draw some objects")
    ids = {name: number for number, name in enumerate(names, 1)}
    return read_images(
        folder, {number: name for name, number in ids.items()}, [root],
        ((_image(file, entry), (file, entry)) for file, entry in read),
        partial(_read_objects, ids),
        [f"{file}: {entry}" for file, entry in entries if isinstance(entry, str)],
    )  # fmt: skip


def _files(folder: Path) -> Iterator[Path]:
    return files_below(folder, (".json",))


def _read(file: Path) -> Entry | str:
    """Returns the content of a LabelMe file, or the reason why it is not one."""
    if not os.path.isfile(file):  # reading a pipe may never end
        return "not a file"
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        return f"not a readable JSON file: {reason(error)}"
    if not isinstance(content, dict) or not isinstance(content.get("imagePath"), str):
        return "not a file of LabelMe's, which has an imagePath and shapes"
    content.pop("imageData", None)  # a copy of the image file
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        return "has no list of shapes"
    for shape in shapes:
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            return "has a shape without a label"
        shape["shape_type"] = shape.get("shape_type") or "polygon"  # old versions write none
    return content


def _image(file: Path, entry: Entry) -> Path:
    """Returns the path of the image, which is relative to the JSON file; Windows writes backslashes.

    An image that was moved may lie beside the JSON file.
    """
    stated: str = entry["imagePath"]
    named = file.parent / stated.replace("\\", "/")
    beside = file.parent / named.name
    return beside if os.path.isfile(beside) and not os.path.isfile(named) else named


def _read_objects(ids: dict[str, int], named: tuple[Path, Entry], size: Size) -> Objects:
    """Reads the objects of an image.

    Raises:
        ValueError: when the JSON file is of an image of another size.
    """
    file, entry = named
    stated = entry.get("imageHeight"), entry.get("imageWidth")
    if None not in stated and stated != size:
        height, width = stated
        raise ValueError(f"{file}: says {width}x{height}, its image is {size[1]}x{size[0]} pixels")
    objects = Objects()
    for label, shapes in _groups(entry["shapes"]):
        try:
            if any(shape["shape_type"] == "mask" for shape in shapes):
                objects.add_mask(ids[label], _bitmap(shapes, size))
            else:
                objects.add_polygons(ids[label], [_polygon(shape) for shape in shapes])
        except ValueError as error:
            objects.unreadable.append(f"{file} shape {label}: {error}")
    return objects


def _groups(shapes: list[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """Yields the label and the shapes of each object."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for number, shape in enumerate(shapes):
        if shape["label"] in NO_CLASS:
            continue
        group = shape.get("group_id")
        key = f"alone {number}" if group is None else repr(group)
        groups.setdefault((shape["label"], key), []).append(shape)
    for (label, _), members in groups.items():
        yield label, members


def _polygon(shape: Entry) -> list[float]:
    """Returns the outline of a shape as `[x1, y1, x2, …]` in pixels.

    Raises:
        ValueError: when the shape has no area, or when its points are not pairs of numbers.
    """
    points, kind = shape.get("points"), shape["shape_type"]
    try:
        pairs = [(float(x), float(y)) for x, y in points]  # type: ignore[union-attr]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("expected points of two numbers each") from error
    if not all(map(math.isfinite, (value for pair in pairs for value in pair))):
        raise ValueError("has a point that is not finite")
    if kind == "rectangle" and len(pairs) == 2:
        (x1, y1), (x2, y2) = pairs
        return [x1, y1, x2, y1, x2, y2, x1, y2]
    if kind == "circle" and len(pairs) == 2:
        (x, y), edge = pairs
        radius = math.dist((x, y), edge)
        turns = (2 * math.pi * i / _CORNERS_OF_CIRCLE for i in range(_CORNERS_OF_CIRCLE))
        return [v for t in turns for v in (x + radius * math.cos(t), y + radius * math.sin(t))]
    if kind in ("polygon", "rectangle", "oriented_rectangle", "rotation") and len(pairs) >= 3:
        return [value for pair in pairs for value in pair]
    raise ValueError(f"a {kind} of {len(pairs)} points has no area")


def _bitmap(shapes: list[Entry], size: Size) -> NDArray[np.bool_]:
    """Returns the pixels that any of the shapes covers."""
    from comask.segmentation import read_segmentation

    whole = np.zeros(size, bool)
    for shape in shapes:
        if shape["shape_type"] == "mask":
            left, top, crop = _crop(shape, size)
            whole[top : top + crop.shape[0], left : left + crop.shape[1]] |= crop
        else:
            whole |= read_segmentation([_polygon(shape)], *size).bitmap()
    return whole


def _crop(shape: Entry, size: Size) -> tuple[int, int, NDArray[np.bool_]]:
    """Returns (left, top, pixels) of a shape that is a mask: a PNG of the part of the image.

    Raises:
        ValueError: when it cannot be read, or reaches beyond the image.
    """
    from PIL import Image

    try:
        (left, top), *_ = ([int(x), int(y)] for x, y in shape["points"])
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
            width, height = image.size
            if left < 0 or top < 0 or left + width > size[1] or top + height > size[0]:
                raise ValueError(f"{width}x{height} pixels at {left},{top} reach beyond the image")
            return left, top, np.asarray(image.convert("L")) > 0
    # A broken PNG is a SyntaxError.
    except (
        KeyError, TypeError, ValueError, OverflowError, OSError, SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # fmt: skip
        raise ValueError(f"its mask cannot be read: {reason(error)}") from error
