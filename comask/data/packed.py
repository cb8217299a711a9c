"""Packs a data set into a few arrays, which processes share instead of holding a copy each.

Reading a Python object changes its reference count, which copies its memory into a forked process. So a
loading process would end up with a copy of every annotation that it loads. The bytes of an array stay
shared.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import ImageFolder
from comask.data.problems import Problem
from comask.data.source import Category, Id, ImageInfo, InstanceSource

MEMORY = Path("/dev/shm")  # a folder in memory
# The free space that must exist, in multiples of the data, since batches also pass through the folder.
_SPARE = 2


class Records:
    """A sequence of Python values that are pickled into one array and unpickled at each access.

    Args:
        values: the values; each one may be freed before the next one is made.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        content, ends = bytearray(), [0]
        for value in values:
            content += pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(content))
        self._content, self._ends = np.frombuffer(content, np.uint8), np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        start, end = self._ends[index], self._ends[index + 1]
        return pickle.loads(self._content[start:end].data)  # trusted: pickled above


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedSource:
    """An `InstanceSource` over image files whose entries are `Records`.

    Attributes:
        categories: the classes in label order.
        images: the image files.
        infos: (id, file_name, height, width) of each image.
        entries: the annotations of each image.
        objects: the number of objects by category id; crowds do not count.
        problems: the problems of the part of the data set that was left out.
    """

    categories: tuple[Category, ...]
    images: ImageFolder
    infos: Records
    entries: Records
    objects: dict[Id, int]
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(
        cls, source: InstanceSource, images: ImageFolder, problems: Iterable[Problem] = ()
    ) -> PackedSource:
        """Packs a source whose image files are `images`."""
        indices = range(len(source))
        infos = map(source.info, indices)
        objects = Counter(
            annotation["category_id"]
            for index in indices
            for annotation in source.annotations(index)
            if not annotation.get("iscrowd")
        )
        return cls(
            categories=source.categories,
            images=images,
            infos=Records((info.id, info.file_name, info.height, info.width) for info in infos),
            entries=Records(map(source.annotations, indices)),
            objects=dict(objects),
            problems=tuple(problems),
        )

    def with_categories(self, categories: tuple[Category, ...]) -> PackedSource:
        """Returns a copy with fewer categories, which must contain those of all objects."""
        return replace(self, categories=categories)

    def __len__(self) -> int:
        return len(self.infos)

    def info(self, index: int) -> ImageInfo:
        """Returns id, name and size of image `index`, without decoding it."""
        id_, file_name, height, width = self.infos[index]
        return ImageInfo(id=id_, file_name=file_name, height=height, width=width)

    def path(self, index: int) -> Path:
        """Returns the path of image `index`, as `ImageFolder.path` finds it."""
        return self.images.path(self.info(index).file_name)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Decodes image `index` to u8 [H, W, 3] RGB, with the checks of `ImageFolder.image`."""
        return self.images.image(self.info(index))

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """Returns a copy of the COCO annotations of image `index`."""
        annotations: list[dict[str, Any]] = self.entries[index]
        return annotations


def write_arrays(value: object) -> Path:
    """Writes a value to files for other processes of this machine, with one file per array.

    Returns:
        A new folder, which the caller removes; it is in memory if that has enough room.
    """
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    needed = sum(buffer.raw().nbytes for buffer in buffers)
    room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > _SPARE * needed
    folder = Path(tempfile.mkdtemp(prefix="comask-", dir=MEMORY if room else None))
    (folder / "rest.pickle").write_bytes(rest)
    for number, buffer in enumerate(buffers):
        (folder / f"{number}.array").write_bytes(buffer.raw())
    return folder


def open_arrays(folder: Path) -> Any:
    """Reads what `write_arrays` wrote; all processes that open it share the arrays' memory."""
    files = [folder / f"{number}.array" for number in range(len(list(folder.glob("*.array"))))]
    arrays = [np.memmap(file, np.uint8, mode="r") for file in files]
    content = (folder / "rest.pickle").read_bytes()
    return pickle.loads(content, buffers=arrays)  # trusted: `write_arrays` pickled it
