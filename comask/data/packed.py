"""A data set in a few arrays, which processes share instead of holding a copy each.

Python objects are copied into a forked process as soon as it looks at them, since looking counts
references: a loading process would end up with a copy of every annotation that it loads. Bytes in an
array stay where they are.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.data.coco import ImageFolder
from comask.data.source import Category, Id, ImageInfo, InstanceSource

_REST = "rest.pickle"


class Records:
    """Python values that are pickled into one array, and come out as copies.

    Args:
        content: u8, the pickles one after the other.
        ends: i64 [N], where each ends.
    """

    def __init__(self, content: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self._content, self._ends = content, ends

    @classmethod
    def of(cls, values: Iterable[Any]) -> Records:
        """Packs values, each of which may be freed before the next one is made."""
        content, ends = bytearray(), []
        for value in values:
            content += pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(content))
        return cls(np.frombuffer(content, np.uint8), np.array(ends, np.int64))

    @classmethod
    def open(cls, folder: Path, name: str) -> Records:
        """What `save` wrote, read from the disk where and when it is needed."""
        content, ends = (
            np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("content", "ends")
        )
        return cls(content, ends)

    def save(self, folder: Path, name: str) -> None:
        """Writes two files into a folder."""
        np.save(folder / f"{name}.content.npy", self._content)
        np.save(folder / f"{name}.ends.npy", self._ends)

    @property
    def nbytes(self) -> int:
        """Bytes of memory or disk that the values take."""
        return self._content.nbytes + self._ends.nbytes

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = self._ends[index - 1] if index else 0
        return pickle.loads(self._content[start : self._ends[index]].data)  # our own


class PackedSource:
    """An `InstanceSource` over image files whose entries are `Records`.

    Args:
        categories: in label order.
        folder: of the image files.
        infos: (id, file_name, height, width) of each image.
        annotations: of each image.
        objects: how many objects each category has, crowds apart; by id.
    """

    def __init__(
        self,
        categories: tuple[Category, ...],
        folder: ImageFolder,
        infos: Records,
        annotations: Records,
        objects: dict[Id, int],
    ) -> None:
        self.categories, self.objects = categories, objects
        self._folder, self._infos, self._annotations = folder, infos, annotations

    @classmethod
    def of(cls, source: InstanceSource, folder: ImageFolder) -> PackedSource:
        """Packs a source whose images lie in `folder`."""
        indices = range(len(source))
        infos = map(source.info, indices)
        objects = Counter(
            annotation["category_id"]
            for index in indices
            for annotation in source.annotations(index)
            if not annotation.get("iscrowd")
        )
        return cls(
            source.categories,
            folder,
            Records.of((info.id, info.file_name, info.height, info.width) for info in infos),
            Records.of(map(source.annotations, indices)),
            dict(objects),
        )

    @classmethod
    def open(cls, folder: Path) -> PackedSource:
        """What `save` wrote; every process that opens it shares the same memory."""
        categories, images, objects = pickle.loads((folder / _REST).read_bytes())
        infos, annotations = (Records.open(folder, name) for name in ("infos", "annotations"))
        return cls(categories, images, infos, annotations, objects)

    def save(self, folder: Path) -> None:
        """Writes the entries into a folder, for processes of this machine."""
        self._infos.save(folder, "infos")
        self._annotations.save(folder, "annotations")
        rest = (self.categories, self._folder, self.objects)
        (folder / _REST).write_bytes(pickle.dumps(rest))

    @property
    def nbytes(self) -> int:
        """Bytes of memory or disk that the entries take."""
        return self._infos.nbytes + self._annotations.nbytes

    def with_categories(self, categories: tuple[Category, ...]) -> PackedSource:
        """The same with some of its categories, which all of its objects must be of."""
        return PackedSource(categories, self._folder, self._infos, self._annotations, self.objects)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, index: int) -> ImageInfo:
        """See `InstanceSource`."""
        id_, file_name, height, width = self._infos[index]
        return ImageInfo(id=id_, file_name=file_name, height=height, width=width)

    def path(self, index: int) -> Path:
        """See `ImageFolder`."""
        return self._folder.path(self.info(index).file_name)

    def image(self, index: int) -> NDArray[np.uint8]:
        """See `ImageFolder`."""
        return self._folder.image(self.info(index))

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """See `InstanceSource`."""
        annotations: list[dict[str, Any]] = self._annotations[index]
        return annotations
