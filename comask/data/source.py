"""Defines the interface of data sets that training and evaluation use."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from comask.errors import ImageError, one_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# Ids are names; never calculate with them: some data sets have hashes beyond 2**53 or strings as ids.
Id: TypeAlias = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """A class of a COCO data set; ids may have gaps, labels do not."""

    id: Id
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """One entry of a COCO file's `images`; sizes are in pixels."""

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
        """Returns id, name and size of image `index`, without decoding it."""

    def image(self, index: int) -> NDArray[np.uint8]:
        """Decodes image `index` to u8 [H, W, 3], RGB."""

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """Returns the COCO annotations of image `index`.

        Each has `id`, `image_id`, `category_id`, `bbox` (x, y, w, h in pixels), `area`, `iscrowd`
        and `segmentation` (polygons or RLE).
        """


def not_decoded_text(not_decoded: int, scored: int) -> str:
    """Says how many images of a report were not scored, and why."""
    return f"{not_decoded} of {not_decoded + scored} images cannot be decoded"


def readable_images(
    source: InstanceSource, indices: Iterable[int]
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yields indices and images; images that cannot be decoded are logged and skipped."""
    for index in indices:
        try:
            yield index, source.image(index)
        except ImageError as error:
            logger.warning("skipped: %s", one_line(error))
