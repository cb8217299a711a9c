"""A COCO-format data set on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.data.source import Category, ImageInfo
from comask.errors import DataError
from comask.preprocess import decode_image

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

    Args:
        image_folder: holds the images under their `file_name`.
        annotation_file: COCO instances JSON.

    Raises:
        DataError: when the file cannot be read or is not COCO's.
    """

    def __init__(self, image_folder: Path, annotation_file: Path) -> None:
        self._folder = image_folder
        try:
            content = json.loads(annotation_file.read_text())
        except FileNotFoundError as error:
            raise DataError(f"{annotation_file}: no such annotation file") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{annotation_file}: not a readable JSON file: {error}") from error
        try:
            # sorted by id, so that labels do not depend on the file's order
            self.categories = tuple(
                Category(id=entry["id"], name=entry["name"])
                for entry in sorted(content["categories"], key=lambda entry: entry["id"])
            )
            self._infos = [
                ImageInfo(
                    id=entry["id"],
                    file_name=entry["file_name"],
                    height=entry["height"],
                    width=entry["width"],
                )
                for entry in content["images"]
            ]
            self._annotations: dict[int, list[dict[str, Any]]] = {i.id: [] for i in self._infos}
            for annotation in content["annotations"]:
                self._annotations.setdefault(annotation["image_id"], []).append(annotation)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{annotation_file}: not COCO instances: expected images (id, file_name, height, "
                f"width), annotations (image_id, …) and categories (id, name); missing {error}"
            ) from error

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, index: int) -> ImageInfo:
        """See `InstanceSource`."""
        return self._infos[index]

    def path(self, index: int) -> Path:
        """Where image `index` lies."""
        return self._folder / self._infos[index].file_name

    def image(self, index: int) -> NDArray[np.uint8]:
        """See `InstanceSource`.

        Raises:
            ImageError: when it cannot be decoded.
            DataError: when its size is not the annotated one.
        """
        pixels = decode_image(self.path(index))
        info = self._infos[index]
        if pixels.shape[:2] != (info.height, info.width):
            raise DataError(
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
    for images, annotation_file in LAYOUTS[split]:
        if (folder / annotation_file).is_file():
            return CocoSource(folder / images, folder / annotation_file)
    expected = " or ".join(f"{i}/ with {a}" for i, a in LAYOUTS[split])
    raise DataError(f"{folder}: no data set found; expected {expected}")
