"""Reads YOLO's segmentation data sets: a `data.yaml`, and a text file of polygons for each image.

The format is described at https://docs.ultralytics.com/datasets/segment/. Each line of a text file is
`class x1 y1 x2 y2 …`, with coordinates as shares of the image's width and height.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from comask.data.coco import CocoSource
from comask.data.content import Content, files_with_sizes
from comask.errors import DataError, one_line
from comask.media_files import kind_of_file

_PARTS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
_BOX = 4  # numbers of a line that has a box instead of a polygon


def find_yolo(file: Path) -> Mapping[str, Callable[[], CocoSource]]:
    """Returns the parts `train` and `val` that a `data.yaml` names.

    Raises:
        DataError: when the file cannot be read, or when it names no classes or no images.
    """
    content = _read_yaml(file)
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(f"{file}: expected `names`, a list of class names; found {names!r}")
    classes = {number: str(name) for number, name in names.items() if isinstance(number, int)}
    parts = {}
    for part, keys in _PARTS.items():
        key = next((key for key in keys if content.get(key)), None)
        if key is not None:
            parts[part] = partial(_read_part, file, content, key, classes)
    if not parts:
        raise DataError(f"{file}: names no images; expected `train` and `val` with folders")
    return parts


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file}: not a readable YAML file: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected keys such as train, val and names")
    return content


def _read_part(
    file: Path, content: dict[str, Any], key: str, classes: Mapping[int, str]
) -> CocoSource:
    """Reads the images that `content[key]` names, with their text files."""
    root = _root(file, content)
    images = _images(file, root, content[key])
    data = Content({number: name for number, name in sorted(classes.items())})
    for image, size in files_with_sizes(images):
        image_id = data.add_image(image, size)
        labels = _labels(image)
        try:
            lines = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
        except (OSError, ValueError) as error:
            data.unreadable.append(f"{labels}: {one_line(error)}")
            data.drop_image()
            continue
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    _add_line(data, image_id, line, size)
                except ValueError as error:
                    data.unreadable.append(f"{labels} line {number}: {error}")
    return data.source()


def _root(file: Path, content: dict[str, Any]) -> Path:
    """Returns the folder that the file's paths are relative to: its `path` if that exists."""
    named = content.get("path")
    if isinstance(named, str):
        for place in (file.parent / named, Path(named)):
            if place.is_dir():
                return place
    return file.parent


def _images(file: Path, root: Path, named: Any) -> list[Path]:
    """Returns the image files of a part: a folder, a text file of paths, or a list of both."""
    found: list[Path] = []
    for entry in named if isinstance(named, list) else [named]:
        place = _place(root, file.parent, str(entry))
        if place is None:
            raise DataError(f"{file}: {entry}: no such folder or file")
        if place.is_dir():
            found += sorted(f for f in place.rglob("*") if kind_of_file(f) == "image")
            continue
        try:
            lines = place.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"{place}: not a readable list of images: {one_line(error)}") from error
        found += [place.parent / line if line.startswith("./") else root / line
                  for line in map(str.strip, lines) if line]  # fmt: skip
    if not found:
        raise DataError(f"{file}: no images in {named}")
    return found


def _place(root: Path, folder: Path, name: str) -> Path | None:
    """Finds a path of the file.

    Roboflow writes `../train/images` for a folder beside the file, so that the path is also tried without
    its first part.
    """
    tried = [root / name, folder / name, folder / name.removeprefix("../")]
    return next((Path(os.path.normpath(place)) for place in tried if place.exists()), None)


def _labels(image: Path) -> Path:
    """Returns the text file of an image: the last folder `images` of its path becomes `labels`."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _add_line(data: Content, image_id: int, line: str, size: tuple[int, int]) -> None:
    """Adds the object of a line.

    Raises:
        ValueError: when the line is not a class and numbers.
    """
    first, *rest = line.split()
    category = int(float(first)) if float(first).is_integer() else None
    if category is None:
        raise ValueError(f"expected the number of a class, found {first[:20]}")
    numbers = [float(number) for number in rest]
    if len(numbers) % 2:
        raise ValueError(f"expected pairs of coordinates, found {len(numbers)} numbers")
    height, width = size
    if len(numbers) == _BOX:  # a set for detection
        x, y, w, h = (n * side for n, side in zip(numbers, (width, height) * 2, strict=True))
        data.add_box(image_id, category, (x - w / 2, y - h / 2, w, h))
        return
    polygon = [n * (width, height)[i % 2] for i, n in enumerate(numbers)]
    data.add_polygons(image_id, category, [polygon])
