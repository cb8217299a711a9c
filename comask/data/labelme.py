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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import CocoSource
from comask.data.content import Content, files_with_sizes
from comask.errors import DataError, one_line
from comask.files import parse_json

# Labels that LabelMe's own converters leave out.
NO_CLASS = ("__ignore__", "_background_")
_CORNERS_OF_CIRCLE = 64
_THREADS = 16
_TRIED = 3  # JSON files by which a folder is recognised

Entry = dict[str, Any]


def holds_labelme(folder: Path) -> bool:
    """Returns whether the first JSON files of a folder are LabelMe's."""
    files = sorted(folder.rglob("*.json"))[:_TRIED]
    return any(isinstance(_read(file), dict) for file in files)


def read_labelme(folder: Path, images: Path) -> CocoSource:
    """Reads the JSON files of a folder; the image paths in them must not lead out of `images`.

    Raises:
        DataError: when there is no object.
    """
    files = sorted(folder.rglob("*.json"))
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(_read, files))
    read = [(file, e) for file, e in zip(files, entries, strict=True) if isinstance(e, dict)]
    labels = {shape["label"] for _, entry in read for shape in entry["shapes"]}
    names = sorted(labels - {*NO_CLASS})
    if not names:
        raise DataError(f"{folder}: the JSON files of LabelMe have no shape")
    ids = {name: number for number, name in enumerate(names, 1)}
    data = Content({number: name for name, number in ids.items()})
    data.unreadable += [
        f"{file}: {e}" for file, e in zip(files, entries, strict=True) if isinstance(e, str)
    ]
    paths = [_image_path(file, entry) for file, entry in read]
    for (file, entry), (image, size) in zip(read, files_with_sizes(paths), strict=True):
        image_id = data.add_image(image, size)
        for label, shapes in _groups(entry["shapes"]):
            try:
                if any(shape["shape_type"] == "mask" for shape in shapes):
                    data.add_mask(image_id, ids[label], _bitmap(shapes, size))
                else:
                    data.add_polygons(image_id, ids[label], [_polygon(shape) for shape in shapes])
            except (ValueError, OSError) as error:
                data.unreadable.append(f"{file} shape {label}: {one_line(error)}")
    return data.source(within=images)


def _read(file: Path) -> Entry | str:
    """Returns the content of a file of LabelMe's, or why it is none."""
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        return one_line(error)
    if not isinstance(content, dict) or not isinstance(content.get("imagePath"), str):
        return "not a file of LabelMe's, which has an imagePath and shapes"
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        return "has no list of shapes"
    for shape in shapes:
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            return "has a shape without a label"
        shape.setdefault("shape_type", "polygon")
    return content


def _image_path(file: Path, entry: Entry) -> Path:
    """Returns the path of the image, which is relative to the JSON file; Windows writes backslashes."""
    return Path(os.path.normpath(file.parent / entry["imagePath"].replace("\\", "/")))


def _groups(shapes: list[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """Yields the label and the shapes of each object."""
    groups: dict[tuple[str, object], list[Entry]] = {}
    for number, shape in enumerate(shapes):
        if shape["label"] in NO_CLASS:
            continue
        group = shape.get("group_id")
        key: object = ("alone", number) if group is None else group
        groups.setdefault((shape["label"], repr(key)), []).append(shape)
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
    except (TypeError, ValueError) as error:
        raise ValueError("expected points of two numbers each") from error
    if kind == "polygon":
        return [value for pair in pairs for value in pair]
    if kind == "rectangle" and len(pairs) == 2:
        (x1, y1), (x2, y2) = pairs
        return [x1, y1, x2, y1, x2, y2, x1, y2]
    if kind == "rectangle" and len(pairs) == 4:
        return [value for pair in pairs for value in pair]
    if kind == "circle" and len(pairs) == 2:
        (x, y), edge = pairs
        radius = math.dist((x, y), edge)
        turns = (2 * math.pi * i / _CORNERS_OF_CIRCLE for i in range(_CORNERS_OF_CIRCLE))
        return [v for t in turns for v in (x + radius * math.cos(t), y + radius * math.sin(t))]
    raise ValueError(f"a {kind} of {len(pairs)} points is no area")


def _bitmap(shapes: list[Entry], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns the pixels that any of the shapes covers."""
    from PIL import Image

    from comask.segmentation import read_segmentation

    height, width = size
    whole = np.zeros(size, bool)
    for shape in shapes:
        if shape["shape_type"] != "mask":
            polygon = read_segmentation([_polygon(shape)], height, width)
            whole |= polygon.part(0, 0, width, height).astype(bool)
            continue
        try:
            (x1, y1), *_ = shape["points"]
            with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
                crop = np.asarray(image.convert("L")) > 0
            left, top = int(x1), int(y1)
        except (KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
            raise ValueError(f"its mask cannot be read: {one_line(error)}") from error
        rows, columns = (
            slice(max(top, 0), top + len(crop)),
            slice(max(left, 0), left + crop.shape[1]),
        )
        target = whole[rows, columns]
        target |= crop[max(-top, 0) :, max(-left, 0) :][: target.shape[0], : target.shape[1]]
    return whole
