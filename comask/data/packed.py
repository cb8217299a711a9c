"""A data set in a few arrays, which processes share instead of holding a copy each.

Python objects are copied into a forked process as soon as it looks at them, since looking counts
references: a loading process would end up with a copy of every annotation that it loads. Bytes in an
array stay where they are.
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
_SPARE = 2  # times what is written there; batches pass through it, too


class Records:
    """Python values that are pickled into one array, and come out as copies.

    Args:
        values: each may be freed before the next one is made.
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
        start, end = self._ends[index : index + 2]
        return pickle.loads(self._content[start:end].data)  # our own


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedSource:
    """An `InstanceSource` over image files whose entries are `Records`.

    Attributes:
        categories: in label order.
        images: the image files.
        infos: (id, file_name, height, width) of each image.
        entries: the annotations of each image.
        objects: how many objects each category has, crowds apart; by id.
        problems: what is wrong with the rest of the data set.
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
        """The same with some of its categories, which all of its objects must be of."""
        return replace(self, categories=categories)

    def __len__(self) -> int:
        return len(self.infos)

    def info(self, index: int) -> ImageInfo:
        """See `InstanceSource`."""
        id_, file_name, height, width = self.infos[index]
        return ImageInfo(id=id_, file_name=file_name, height=height, width=width)

    def path(self, index: int) -> Path:
        """See `ImageFolder`."""
        return self.images.path(self.info(index).file_name)

    def image(self, index: int) -> NDArray[np.uint8]:
        """See `ImageFolder`."""
        return self.images.image(self.info(index))

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """See `InstanceSource`."""
        annotations: list[dict[str, Any]] = self.entries[index]
        return annotations


def write_arrays(value: object) -> Path:
    """Writes a value for processes of this machine; its arrays become files of their own.

    Returns:
        A new folder, in memory where that has room, which the caller removes.
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
    """What `write_arrays` wrote; every process that opens it shares the same memory."""
    files = [folder / f"{number}.array" for number in range(len(list(folder.glob("*.array"))))]
    arrays = [np.memmap(file, np.uint8, mode="r") for file in files]
    return pickle.loads((folder / "rest.pickle").read_bytes(), buffers=arrays)  # our own
