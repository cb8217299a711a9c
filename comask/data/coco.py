"""A COCO-format data set on disk."""

from __future__ import annotations

import reprlib
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from comask.data.source import Category, ImageInfo
from comask.errors import DataError, ImageError
from comask.parse_json import parse_json
from comask.preprocess import decode_image

T = TypeVar("T", int, str, list[Any])

# (images, annotations) of the layouts that are recognised, in this order
LAYOUTS = {
    "train": [
        ("images", "annotations/instances.json"),
        ("train2017", "annotations/instances_train2017.json"),
    ],
    "val": [
        ("images", "annotations/instances.json"),
        ("val2017", "annotations/instances_val2017.json"),
    ],
}


class CocoSource:
    """An `InstanceSource` over an annotation file and a folder of images.

    Only what would make the set unusable is an error here; the rest is for `comask.data.check`.

    Args:
        image_folder: holds the images under their `file_name`.
        annotation_file: COCO instances JSON.

    Attributes:
        categories: by ascending id.
        stray_annotations: those whose `image_id` is none of the images'.

    Raises:
        DataError: when the file cannot be read or is not COCO's, or when categories share an id or
            a name.
    """

    def __init__(self, image_folder: Path, annotation_file: Path) -> None:
        self._folder = image_folder
        try:
            content = parse_json(annotation_file.read_bytes())
        except FileNotFoundError as error:
            raise DataError(f"{annotation_file}: no such annotation file") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{annotation_file}: not a readable JSON file: {error}") from error
        try:
            self.categories = _categories(_field(content, "categories", list))
            self._infos = [
                ImageInfo(
                    id=_field(entry, "id", int),
                    file_name=_field(entry, "file_name", str),
                    height=_field(entry, "height", int),
                    width=_field(entry, "width", int),
                )
                for entry in _field(content, "images", list)
            ]
            annotations = _field(content, "annotations", list)
            if not all(isinstance(annotation, dict) for annotation in annotations):
                raise DataError("not COCO instances: expected annotations that are JSON objects")
        except DataError as error:
            raise DataError(f"{annotation_file}: {error}") from error
        self._annotations: dict[object, list[dict[str, Any]]] = {i.id: [] for i in self._infos}
        self.stray_annotations: list[dict[str, Any]] = []
        for annotation in annotations:
            image = annotation.get("image_id")
            known = isinstance(image, int | float) and image in self._annotations
            (self._annotations[image] if known else self.stray_annotations).append(annotation)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, index: int) -> ImageInfo:
        """See `InstanceSource`."""
        return self._infos[index]

    def path(self, index: int) -> Path:
        """Where image `index` lies.

        Raises:
            ImageError: when its entry leads out of the folder, as one from a stranger may.
        """
        name = PurePath(self._infos[index].file_name)
        if name.is_absolute() or ".." in name.parts:
            raise ImageError(f"{name}: this file_name leads out of {self._folder}, and is not read")
        return self._folder / name

    def image(self, index: int) -> NDArray[np.uint8]:
        """See `InstanceSource`.

        Raises:
            ImageError: when it cannot be decoded, its size is not the annotated one, or see `path`.
        """
        pixels = decode_image(self.path(index))
        info = self._infos[index]
        if pixels.shape[:2] != (info.height, info.width):
            raise ImageError(
                f"{self.path(index)}: is {pixels.shape[1]}x{pixels.shape[0]} pixels, its annotation "
                f"says {info.width}x{info.height}"
            )
        return pixels

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """See `InstanceSource`."""
        return self._annotations[self._infos[index].id]


def coco_source(folder: Path, split: str) -> CocoSource:
    """The data set in `folder`: `images/` + `annotations/instances.json`, or COCO 2017's names.

    Args:
        folder: of the data set.
        split: `train` or `val`; decides between train2017 and val2017.

    Raises:
        DataError: when neither layout is there.
    """
    files = [annotation_file for _, annotation_file in LAYOUTS[split]]
    for images, annotation_file in LAYOUTS[split]:
        if (folder / annotation_file).is_file():
            return CocoSource(folder / images, folder / annotation_file)
    expected = " or ".join(f"{i}/ with {a}" for i, a in LAYOUTS[split])
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; expected one with {expected}")
    for above in folder.parents[:2]:
        if any((above / file).is_file() for file in files):
            raise DataError(f"{folder}: is a part of the data set {above}: give that")
    raise DataError(f"{folder}: no data set found; expected {expected}")


def _categories(entries: list[Any]) -> tuple[Category, ...]:
    """The classes, sorted by id, so that labels do not depend on the file's order."""
    categories = [Category(id=_field(e, "id", int), name=_field(e, "name", str)) for e in entries]
    categories.sort(key=lambda category: category.id)
    for place, category in enumerate(categories):
        for other in categories[:place]:
            if category.id == other.id or category.name == other.name:
                raise DataError(
                    f"categories {other.id} ({other.name}) and {category.id} ({category.name}) share "
                    f"an id or a name; give each its own, labels would be ambiguous"
                )
    return tuple(categories)


def _field(entry: Any, name: str, kind: type[T]) -> T:
    """A field of a JSON object, a whole number's float taken for the integer.

    Raises:
        DataError: when it is missing or of another type.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind):
        raise DataError(
            f"not COCO instances: expected images (id, file_name, height, width), annotations "
            f"(image_id, …) and categories (id, name); found no {name} ({kind.__name__}) in "
            f"{reprlib.repr(entry)}"
        )
    return value
