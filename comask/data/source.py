"""What training and evaluation need to know of a data set, wherever its images come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """A class as COCO names it; `id` may have gaps, labels never do."""

    id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """One entry of a COCO file's `images`. Sizes in pixels."""

    id: int
    file_name: str
    height: int
    width: int


class InstanceSource(Protocol):
    """An indexed set of images with COCO annotations.

    A label is a category's place in `categories`, counted from 0.
    """

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes, in label order."""

    def __len__(self) -> int: ...

    def info(self, index: int) -> ImageInfo:
        """Id, name and size of image `index`, without decoding it."""

    def image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as u8 [H, W, 3], RGB."""

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """COCO annotations of image `index`.

        Each has `id`, `image_id`, `category_id`, `bbox` (x, y, w, h in pixels), `area`, `iscrowd`
        and `segmentation` (polygons or RLE).
        """
