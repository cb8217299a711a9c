"""Reads YOLO's segmentation data sets: a `data.yaml`, and a text file of polygons for each image.

The format is described at https://docs.ultralytics.com/datasets/segment/. Each line of a text file is
`class x1 y1 x2 y2 …`, with coordinates as shares of the image's width and height.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from comask.data.coco import CocoSource
from comask.data.content import (
    Objects,
    Size,
    files_below,
    read_images,
    read_lines,
    read_list,
    reason,
    spelled,
)
from comask.errors import DataError
from comask.media_files import IMAGE_SUFFIXES

_PARTS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
_NOTHING = ("", "~", "null", "Null", "NULL", None)  # what an empty value of YAML looks like
_BOX = 4  # numbers of a line that has a box instead of a polygon


def find_yolo(file: Path) -> Mapping[str, Callable[[], CocoSource]]:
    """Returns the parts `train` and `val` that a `data.yaml` names.

    Raises:
        DataError: when the file cannot be read, or when it names no classes or no images.
    """
    content = _read_yaml(file)
    classes, root = _classes(file, content), _root(file, content)
    if "kpt_shape" in content:
        raise DataError(
            f"{file}: has keypoints (kpt_shape); expected polygons of a segmentation set"
        )
    parts = {}
    for part, keys in _PARTS.items():
        named = [key for key in keys if content.get(key) not in _NOTHING]
        # Roboflow's file names folders of images that the set does not have.
        there = [key for key in named if all(_places(file, root, content[key]).values())]
        if named:
            key = (there or named)[0]
            parts[part] = partial(_read_part, file, root, classes, key, content[key])
    if not parts:
        raise DataError(f"{file}: names no images; expected folders under train and val")
    return parts


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        # This loader reads every value as text, so that a class called `no` or `1.0` keeps its name.
        content = yaml.load(file.read_bytes(), yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{file}: not a readable YAML file: {reason(error)}") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{file}: expected the keys train, val and names; found {shortened(content)}"
        )
    return content


def _classes(file: Path, content: dict[str, Any]) -> dict[int, str]:
    """Returns the class names by number, from a list or from a mapping of numbers."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        classes = {int(number): name for number, name in names.items()}  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError):
        classes = {}
    if not classes or not all(isinstance(name, str) for name in classes.values()):
        raise DataError(
            f"{file}: expected `names`, a list of class names; found {shortened(names)}"
        )
    return dict(sorted(classes.items()))


def _root(file: Path, content: dict[str, Any]) -> Path:
    """Returns the folder that the file's paths are relative to: its `path` if that exists."""
    if isinstance(named := content.get("path"), str) and named not in _NOTHING:
        for place in (file.parent / named, Path(named)):
            if os.path.isdir(place):
                return place
    return file.parent


def _places(file: Path, root: Path, value: Any) -> dict[str, Path | None]:
    """Returns where each folder or list of images lies that a key of the file names, None if nowhere.

    Roboflow writes `../train/images` for a folder beside the file, so that a path is also tried without
    its first part.
    """
    found = {}
    for entry in map(str, value if isinstance(value, list) else [value]):
        tried = (root / entry, file.parent / entry, file.parent / entry.removeprefix("../"))
        there = (place for place in tried if os.path.isdir(place) or os.path.isfile(place))
        found[entry] = next((Path(os.path.normpath(place)) for place in there), None)
    return found


def _read_part(
    file: Path, root: Path, classes: Mapping[int, str], key: str, value: Any
) -> CocoSource:
    """Reads the images of a key, whose value is a folder, a text file of paths, or a list of these."""
    images: list[Path] = []
    folders = [root, file.parent]
    for entry, place in _places(file, root, value).items():
        if place is None:
            raise DataError(
                f"{file}: {key} names {shortened(entry)}, which is neither a folder nor a file; correct "
                f"or remove it"
            )
        if place.is_dir():
            folders.append(place)
            images += files_below(place, IMAGE_SUFFIXES)
            continue
        folders.append(place.parent)
        images += [
            (place.parent if line.startswith("./") else root) / line for line in read_list(place)
        ]
    if not images:
        raise DataError(f"{file}: {key} names {shortened(value)}, which has no images")
    source = read_images(file, classes, folders, ((image, image) for image in images), _read_labels)
    if not any(map(source.annotations, range(len(source)))) and not source.unreadable:
        labels = [_labels(image) for image in images]
        if not any(map(os.path.exists, labels)):
            raise DataError(
                f"{file}: none of the {len(images)} images has a text file of labels; expected such as "
                f"{labels[0]}"
            )
    return source


def _labels(image: Path) -> Path:
    """Returns the text file of an image, in `labels` for the last folder `images`, or beside it."""
    beside, folders = spelled(image.with_suffix(".txt")), image.parent.parts
    for place in reversed(range(len(folders))):
        if folders[place] == "images":
            usual = spelled(Path(*folders[:place], "labels", *folders[place + 1 :], beside.name))
            return usual if os.path.lexists(usual) or not os.path.exists(beside) else beside
    return beside


def _read_labels(image: Path, size: Size) -> Objects:
    """Reads the objects of an image; one without a text file has none.

    Raises:
        ValueError: when the text file cannot be read.
    """
    objects, labels = Objects(), _labels(image)
    if not os.path.lexists(labels):
        return objects
    for number, line in enumerate(read_lines(labels), 1):
        try:
            _add_line(objects, line, size)
        except ValueError as error:
            objects.unreadable.append(f"{labels} line {number}: {error}")
    return objects


def _add_line(objects: Objects, line: str, size: Size) -> None:
    """Adds the object of a line.

    Raises:
        ValueError: when the line is not the number of a class and coordinates.
    """
    try:
        category, *shares = map(float, line.split())
    except ValueError:
        category, shares = math.nan, []
    if not category.is_integer() or not all(map(math.isfinite, shares)):
        raise ValueError(f"expected the number of a class and coordinates, found {shortened(line)}")
    if len(shares) < _BOX or len(shares) % 2:
        raise ValueError(f"expected x and y of at least 3 points, found {len(shares)} numbers")
    height, width = size
    pixels = [share * (width, height)[i % 2] for i, share in enumerate(shares)]
    if len(pixels) == _BOX:  # a line of a set for detection
        x, y, w, h = pixels
        objects.add_box(int(category), (x - w / 2, y - h / 2, w, h))
    else:
        objects.add_polygons(int(category), [pixels])
