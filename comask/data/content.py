"""Collects images and objects of any format as COCO instances."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import CocoSource, ImageFolder
from comask.errors import DataError, ImageError, one_line
from comask.preprocess import upright_size

_THREADS = 16  # reading many small files is mostly waiting for the disk

Size = tuple[int, int]  # (height, width) in pixels
T = TypeVar("T")


class Objects:
    """The objects of one image.

    Attributes:
        annotations: one per object, as in COCO's form, without ids.
        unreadable: what could not be read, each with its place and the reason.
    """

    def __init__(self) -> None:
        self.annotations: list[dict[str, Any]] = []
        self.unreadable: list[str] = []

    def add_box(self, category_id: int, bbox: Sequence[float]) -> None:
        """Adds an object without a mask, which `comask.data.check` reports."""
        self._add(category_id, bbox)

    def add_polygons(self, category_id: int, polygons: Sequence[Sequence[float]]) -> None:
        """Adds an object of polygons `[x1, y1, x2, …]` in pixels; its box has the polygons' bounds.

        Raises:
            ValueError: when there is no point.
        """
        xs = [x for polygon in polygons for x in polygon[::2]]
        ys = [y for polygon in polygons for y in polygon[1::2]]
        if not xs or not ys:
            raise ValueError("has no points")
        bbox = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        self._add(category_id, bbox, segmentation=[list(polygon) for polygon in polygons])

    def add_mask(self, category_id: int, mask: NDArray[np.bool_]) -> None:
        """Adds an object of a mask [h, w] of its image; its box has the mask's bounds."""
        import pycocotools.mask

        rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
        self._add(
            category_id, pycocotools.mask.toBbox(rle).tolist(), segmentation=segmentation,
            area=float(mask.sum()),
        )  # fmt: skip

    def _add(self, category_id: int, bbox: Sequence[float], **fields: Any) -> None:
        entry = {"category_id": category_id, "bbox": list(bbox), "iscrowd": 0}
        self.annotations.append(entry | fields)


def read_images(
    place: Path,
    classes: Mapping[int, str],
    folders: Iterable[Path],
    files: Iterable[tuple[Path, T]],
    read: Callable[[T, Size], Objects],
    unreadable: Iterable[str] = (),
) -> CocoSource:
    """Reads the objects of image files.

    A file that lies elsewhere, is missing, or has an unreadable header becomes an image without objects,
    by which `comask.data.check` reports it.

    Args:
        place: the file or folder of the data set, for error messages.
        classes: the name of each class by its id.
        folders: the images must lie in them or their subfolders; annotations need not be trustworthy.
        files: each image file, and what `read` needs to find its objects.
        read: returns the objects of an image by the second value and the image's size. It is called in
            threads. A ValueError or OSError means that the objects are unknown: the image is left out.
        unreadable: what else could not be read, each with its place and the reason.

    Raises:
        DataError: when all images lie elsewhere, or when `CocoSource` raises one.
    """
    within = [Path(os.path.abspath(folder)) for folder in folders]
    base = ImageFolder(Path(os.path.commonpath(within)))
    listed = [(_name(Path(os.path.abspath(file)), within, base.folder), key) for file, key in files]
    if listed and all(os.path.isabs(name) for name, _ in listed):
        raise DataError(
            f"{place}: its images lie outside of it, such as {listed[0][0]}; give a folder that holds "
            f"the images as well"
        )

    def read_one(entry: tuple[str, T]) -> tuple[Size, Objects] | str:
        name, key = entry
        try:
            size = upright_size(base.path(name))
        except ImageError:
            return (1, 1), Objects()
        try:
            return size, read(key, size)
        except (OSError, ValueError) as error:
            return f"{one_line(error)}; the image {name} is left out"

    lines, ids = list(unreadable), dict[str, int]()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for (name, _), found in zip(listed, pool.map(read_one, listed), strict=True):
            if isinstance(found, str):
                lines.append(found)
                continue
            (height, width), objects = found
            again = name in ids
            id_ = ids.setdefault(name, len(ids) + 1)
            images.append({"id": id_, "file_name": name, "height": height, "width": width})
            if again:
                continue
            lines += objects.unreadable
            for annotation in objects.annotations:
                annotations.append({"id": len(annotations) + 1, "image_id": id_} | annotation)
    categories = [{"id": id_, "name": name} for id_, name in classes.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    try:
        return CocoSource(base.folder, content, lines)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _name(file: Path, within: Iterable[Path], base: Path) -> str:
    """Returns the path of an image from `base`; that of a file elsewhere stays absolute."""
    inside = any(file.is_relative_to(folder) for folder in within)
    return (file.relative_to(base) if inside else file).as_posix()


def spelled(file: Path) -> Path:
    """Returns the path of a file whose name the disk may have in another Unicode form."""
    return ImageFolder(file.parent).path(file.name)


def files_below(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Yields the files with these suffixes of a folder and its subfolders, also of linked ones.

    The order is that of the names. Hidden files and folders are left out.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(place, name)


def read_lines(file: Path) -> list[str]:
    """Returns the lines of a text file in UTF-8 that are not blank, without spaces around them.

    Raises:
        ValueError: when it cannot be read; the message has the file's path.
    """
    if not os.path.isfile(file):  # reading a pipe may never end
        raise ValueError(f"{file}: not a file")
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows' editors write a mark at the start
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a readable text in UTF-8: {reason(error)}") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def read_list(file: Path) -> list[str]:
    """Returns `read_lines` of a file without which the data set cannot be read.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        return read_lines(file)
    except ValueError as error:
        raise DataError(str(error)) from error


def reason(error: Exception) -> str:
    """Returns why a file cannot be read, without the file's path."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else error
    return one_line(text)
