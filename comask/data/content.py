"""Collects images and objects of any format as COCO instances."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import CocoSource
from comask.errors import ImageError
from comask.preprocess import upright_size

_THREADS = 16  # reading headers is mostly waiting for the disk
_UNKNOWN_SIZE = (1, 1)  # of a file whose header cannot be read, which `comask.data.check` reports

Size = tuple[int, int]


class Content:
    """The content of a COCO file while a data set of another format is read.

    Args:
        classes: the name of each class by its id.

    Attributes:
        unreadable: what could not be read, each with its place and the reason.
    """

    def __init__(self, classes: Mapping[int, str]) -> None:
        self.unreadable: list[str] = []
        self._categories = [{"id": id_, "name": name} for id_, name in classes.items()]
        self._images: list[dict[str, Any]] = []
        self._files: list[Path] = []
        self._annotations: list[dict[str, Any]] = []

    def add_image(self, file: Path, size: Size) -> int:
        """Adds an image file of (height, width) pixels, and returns its id."""
        self._files.append(file)
        id_ = len(self._files)
        self._images.append({"id": id_, "height": size[0], "width": size[1]})
        return id_

    def drop_image(self) -> None:
        """Leaves out the image that was added last, since its objects are unknown."""
        id_ = self._images.pop()["id"]
        self._annotations = [a for a in self._annotations if a["image_id"] != id_]

    def add_box(self, image_id: int, category_id: int, bbox: Sequence[float]) -> None:
        """Adds an object without a mask, which `comask.data.check` reports."""
        self._add(image_id, category_id, {"bbox": list(bbox)})

    def add_polygons(
        self, image_id: int, category_id: int, polygons: Sequence[Sequence[float]]
    ) -> None:
        """Adds an object of polygons `[x1, y1, x2, …]` in pixels; its box has the polygons' bounds."""
        xs = [x for polygon in polygons for x in polygon[::2]]
        ys = [y for polygon in polygons for y in polygon[1::2]]
        if not xs or not ys:
            return
        bbox = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        self._add(
            image_id, category_id, {"bbox": bbox, "segmentation": [list(p) for p in polygons]}
        )

    def add_mask(self, image_id: int, category_id: int, mask: NDArray[np.bool_]) -> None:
        """Adds an object of a mask [h, w] of its image; its box has the mask's bounds."""
        import pycocotools.mask

        rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
        bbox = pycocotools.mask.toBbox(rle).tolist()
        self._add(image_id, category_id, {
            "bbox": bbox, "segmentation": segmentation, "area": float(mask.sum()),
        })  # fmt: skip

    def _add(self, image_id: int, category_id: int, fields: dict[str, Any]) -> None:
        ids = {"id": len(self._annotations) + 1, "image_id": image_id, "category_id": category_id}
        self._annotations.append(ids | fields | {"iscrowd": 0})

    def source(self, within: Path | None = None) -> CocoSource:
        """Returns the data set.

        Args:
            within: the folder that the images must not lead out of; the deepest folder that holds all
                images by default.
        """
        folder = within or Path(os.path.commonpath([f.parent for f in self._files] or [Path.cwd()]))
        for image in self._images:
            image["file_name"] = Path(
                os.path.relpath(self._files[image["id"] - 1], folder)
            ).as_posix()
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": self._categories,
        }
        return CocoSource(folder, content, self.unreadable)


def files_with_sizes(files: Iterable[Path]) -> Iterator[tuple[Path, Size]]:
    """Yields image files with the height and width in pixels that their headers state."""
    with ThreadPoolExecutor(_THREADS) as pool:
        listed = list(files)
        yield from zip(listed, pool.map(_size, listed), strict=True)


def _size(file: Path) -> Size:
    try:
        return upright_size(file)
    except ImageError:
        return _UNKNOWN_SIZE
