"""What training and evaluation need to know of a data set, wherever its images come from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comask.errors import ImageError, one_line

logger = logging.getLogger(__name__)

# An id is a name, never a number to calculate with: data sets have hashes beyond 2**53, and strings.
Id: TypeAlias = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """A class as COCO names it; `id` may have gaps, labels never do."""

    id: Id
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """One entry of a COCO file's `images`. Sizes in pixels."""

    id: Id
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


def not_decoded_text(not_decoded: int, scored: int) -> str:
    """How many images of a report were not scored, and why, given the numbers of both."""
    return f"{not_decoded} of {not_decoded + scored} images cannot be decoded"


def readable_images(
    source: InstanceSource, indices: Iterable[int]
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Images with their indices; those that cannot be decoded are logged and passed over."""
    for index in indices:
        try:
            yield index, source.image(index)
        except ImageError as error:
            logger.warning("skipped: %s", one_line(error))
