"""Reads data sets in COCO's format from disk, and writes any source in that format."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import reprlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comask.data.source import Category, Id, ImageInfo, InstanceSource
from comask.errors import DataError, ImageError
from comask.files import parse_json, whole_file, write_whole
from comask.preprocess import decode_image
from comask.segmentation import read_segmentation
from comask.structures import Detections

T = TypeVar("T", int, str, list[Any])

TRUE_MASK_SIZE = 112  # four times the resolution of a prediction's mask
LOOKED_FOR = 20  # images by which a file's image folder is found; some may be missing


class CocoSource:
    """An `InstanceSource` over COCO instances and a folder of images.

    Only faults that make the whole set unusable raise an error here; `comask.data.check` reports the
    others.

    Args:
        image_folder: the folder that holds the images under their `file_name`.
        content: what a JSON file of COCO instances holds: images, annotations and categories.
        unreadable: what could not be read, each with its place and the reason.

    Attributes:
        images: the image files.
        categories: the classes, sorted by id; numbers come before texts.
        namesakes: categories without annotations that share their name with a category that has some;
            they are not among `categories`. Roboflow's group category may have the name of its class.
        stray_annotations: annotations whose `image_id` belongs to no image.
        unreadable: see the argument.

    Raises:
        DataError: when the content is not COCO's, or when categories are missing or share an id or a
            name.
    """

    def __init__(self, image_folder: Path, content: Any, unreadable: Sequence[str] = ()) -> None:
        self.images, self.unreadable = ImageFolder(image_folder), tuple(unreadable)
        annotations = _field(content, "annotations", list)
        if not all(isinstance(annotation, dict) for annotation in annotations):
            raise DataError("not COCO instances: expected annotations that are JSON objects")
        self.categories, self.namesakes = _categories(
            _field(content, "categories", list), annotations
        )
        self._infos = [
            ImageInfo(
                id=_id(entry),
                file_name=_field(entry, "file_name", str),
                height=_field(entry, "height", int),
                width=_field(entry, "width", int),
            )
            for entry in _field(content, "images", list)
        ]
        self._annotations: dict[object, list[dict[str, Any]]] = {i.id: [] for i in self._infos}
        self.stray_annotations: list[dict[str, Any]] = []
        for annotation in annotations:
            image = annotation.get("image_id")
            known = isinstance(image, int | float | str) and image in self._annotations
            (self._annotations[image] if known else self.stray_annotations).append(annotation)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, index: int) -> ImageInfo:
        """Returns id, name and size of image `index`, as the annotation file states them."""
        return self._infos[index]

    def path(self, index: int) -> Path:
        """Returns the path of image `index`, as `ImageFolder.path` finds it."""
        return self.images.path(self._infos[index].file_name)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Decodes image `index` to u8 [H, W, 3] RGB, with the checks of `ImageFolder.image`."""
        return self.images.image(self._infos[index])

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """Returns the annotations of image `index`, unchecked, as the file has them."""
        return self._annotations[self._infos[index].id]


class ImageFolder:
    """The image files that an annotation file names.

    Args:
        folder: the folder that holds the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, file_name: str) -> Path:
        """Returns the path of an image.

        The annotation file and the file system may write a name in different Unicode forms (macOS
        decomposes ä, Linux and Windows do not). If no file has exactly this name, the one whose name
        looks the same is returned.

        Raises:
            ImageError: when the name leads out of the folder; annotation files need not be trustworthy.
        """
        name = PurePath(file_name)
        if name.is_absolute() or ".." in name.parts:
            raise ImageError(f"{name}: this file_name leads out of {self.folder} and is not read")
        path = self.folder / name
        if file_name.isascii() or os.path.exists(path):
            return path
        path = self.folder
        for part in name.parts:
            path = _alike(path).get(unicodedata.normalize("NFC", part), path / part)
        return path

    def image(self, info: ImageInfo) -> NDArray[np.uint8]:
        """Decodes an image to u8 [H, W, 3], RGB.

        Raises:
            ImageError: when it cannot be decoded, when its size differs from the annotated one, or when
                `path` raises one.
        """
        path = self.path(info.file_name)
        pixels = decode_image(path)
        if pixels.shape[:2] != (info.height, info.width):
            raise ImageError(
                f"{path}: is {pixels.shape[1]}x{pixels.shape[0]} pixels, but its annotation says "
                f"{info.width}x{info.height}"
            )
        return pixels


@functools.lru_cache(maxsize=64)
def _alike(folder: Path) -> dict[str, Path]:
    """Returns the entries of a folder by their names in composed form."""
    try:
        return {unicodedata.normalize("NFC", entry.name): entry for entry in folder.iterdir()}
    except OSError:
        return {}


def read_coco(annotation_file: Path, image_folder: Path | None = None) -> CocoSource:
    """Reads a JSON file of COCO instances.

    Args:
        annotation_file: the file.
        image_folder: the folder that holds the images under their `file_name`. Without it, the first of
            the usual places that has the first image is taken: the file's folder, `images` or a folder
            of the file's name there and one level above.

    Raises:
        DataError: when the file cannot be read, when no place has the images, or when `CocoSource` raises
            one.
    """
    try:
        content = parse_json(annotation_file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{annotation_file}: no such annotation file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{annotation_file}: not a readable JSON file: {error}") from error
    try:
        return CocoSource(image_folder or _image_folder(annotation_file, content), content)
    except DataError as error:
        raise DataError(f"{annotation_file}: {error}") from error


def _image_folder(annotation_file: Path, content: Any) -> Path:
    """Returns the usual place that has the first image whose file exists anywhere."""
    here, subset = annotation_file.parent, annotation_file.stem.removeprefix("instances_")
    names = ("images", subset, f"images/{subset}")
    places = [here, *(here / name for name in names), *(here.parent / name for name in names)]
    places.append(here.parent)
    entries = _field(content, "images", list)
    for entry in entries[:LOOKED_FOR]:
        name = _field(entry, "file_name", str)
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            continue  # `comask.data.check` reports it
        for place in places:
            if os.path.isfile(ImageFolder(place).path(name)):
                return place
    if not entries:
        return here
    raise DataError(
        f"its images were not found: looked for {reprlib.repr(entries[0].get('file_name'))} in "
        f"{', '.join(map(str, dict.fromkeys(places)))}; name the folder, as in "
        f"{annotation_file.name}:IMAGES"
    )


def detections_from_coco(
    entries: Sequence[Mapping[str, Any]], info: ImageInfo, categories: Sequence[Category]
) -> Detections:
    """Converts COCO annotations or results of one image; crowds and empty boxes are left out.

    Boxes are widened to whole pixels inside the image. Masks are finer than those of predictions:
    [N, TRUE_MASK_SIZE, TRUE_MASK_SIZE]. An entry without a score has a score of 1.

    Args:
        entries: objects with `category_id`, `bbox`, `segmentation` and, for results, `score`.
        info: the image's entry.
        categories: the classes in label order.

    Raises:
        DataError: when a segmentation cannot be used.
    """
    import cv2

    label_of = {category.id: label for label, category in enumerate(categories)}
    boxes, scores, labels, masks = [], [], [], []
    for annotation in entries:
        x, y, w, h = annotation["bbox"]
        x1, y1 = max(0, math.floor(x)), max(0, math.floor(y))
        x2, y2 = min(info.width, math.ceil(x + w)), min(info.height, math.ceil(y + h))
        if annotation.get("iscrowd") or w <= 0 or h <= 0 or x2 <= x1 or y2 <= y1:
            continue
        mask = read_segmentation(annotation["segmentation"], info.height, info.width)
        crop = mask.part(x1, y1, x2, y2).astype(np.float32)
        # INTER_AREA averages pixels where the mask shrinks and repeats them where it grows.
        masks.append(cv2.resize(crop, (TRUE_MASK_SIZE,) * 2, interpolation=cv2.INTER_AREA))
        boxes.append((x1, y1, x2, y2))
        labels.append(label_of[annotation["category_id"]])
        scores.append(annotation.get("score", 1.0))
    return Detections(
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        mask_probs=np.array(masks, np.float32).reshape(-1, TRUE_MASK_SIZE, TRUE_MASK_SIZE),
        image_size=(info.height, info.width),
        class_names=tuple(category.name for category in categories),
    )


def _categories(
    entries: list[Any], annotations: list[dict[str, Any]]
) -> tuple[tuple[Category, ...], tuple[Category, ...]]:
    """Returns (classes, namesakes), sorted by id so that labels do not depend on the file's order."""
    if not entries:
        raise DataError("its categories are empty: expected one object with id and name per class")
    categories = [Category(id=_id(entry), name=_field(entry, "name", str)) for entry in entries]
    categories.sort(key=lambda category: (isinstance(category.id, str), category.id))
    used_ids = {repr(annotation.get("category_id")) for annotation in annotations}
    used_names = {category.name for category in categories if repr(category.id) in used_ids}
    namesakes = tuple(c for c in categories if repr(c.id) not in used_ids and c.name in used_names)
    kept = tuple(category for category in categories if category not in namesakes)
    first: dict[Id | tuple[str], Category] = {}
    for category in kept:
        for key in (category.id, (category.name,)):
            other = first.setdefault(key, category)
            if other is not category:
                raise DataError(
                    f"categories {other.id} ({other.name}) and {category.id} ({category.name}) share "
                    f"an id or a name; give each its own, since labels would be ambiguous"
                )
    return kept, namesakes


def _id(entry: Any) -> Id:
    """Returns the id of an image or category."""
    if isinstance(entry, dict) and isinstance(entry.get("id"), str):
        return str(entry["id"])
    return _field(entry, "id", int, "int or str")


def _field(entry: Any, name: str, kind: type[T], expected: str | None = None) -> T:
    """Returns a field of a JSON object; a float without a fraction counts as an integer.

    Raises:
        DataError: when the field is missing or of another type.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind):
        raise DataError(
            f"not COCO instances: expected images (id, file_name, height, width), annotations "
            f"(image_id, …) and categories (id, name); found no {name} ({expected or kind.__name__}) in "
            f"{reprlib.repr(entry)}"
        )
    return value


def write_coco(
    source: InstanceSource, folder: Path, advance: Callable[[], None] = lambda: None
) -> None:
    """Writes `folder/images/*` and `folder/annotations/instances.json`, which `read_data_set` reads.

    Args:
        source: the data set to write.
        folder: the folder to write to, which is made if it does not exist.
        advance: called after each image.

    Raises:
        DataError: when the folder cannot be written, or holds a data set already.
    """
    annotation_file = folder / "annotations" / "instances.json"
    formats = Image.registered_extensions()
    if annotation_file.exists():
        raise DataError(f"{folder}: holds a data set already; give another folder")
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        annotation_file.parent.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for index in range(len(source)):
            info = source.info(index)
            with whole_file(folder / "images" / info.file_name, durable=False) as file:
                Image.fromarray(source.image(index)).save(
                    file, formats[Path(info.file_name).suffix]
                )
            images.append(dataclasses.asdict(info))
            annotations += source.annotations(index)
            advance()
        content = {
            "info": {"description": "written by comask"},
            "images": images,
            "annotations": annotations,
            "categories": [dataclasses.asdict(category) for category in source.categories],
        }
        # The annotation file is written last: it marks a complete data set.
        write_whole(annotation_file, json.dumps(content).encode())
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
