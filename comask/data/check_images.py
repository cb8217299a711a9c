"""Which images of a data set are sound, by their entries and their files' headers."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

from comask.data.problems import Findings, Kind
from comask.data.source import Id, ImageInfo, InstanceSource
from comask.errors import ImageError
from comask.preprocess import upright_size

_THREADS = 16  # reading headers is waiting for the disk


@runtime_checkable
class FileSource(InstanceSource, Protocol):
    """A source whose images are files."""

    def path(self, index: int) -> Path:
        """Where image `index` lies.

        Raises:
            ImageError: when it must not be read.
        """


def sound_images(source: InstanceSource, findings: Findings) -> list[int]:
    """Indices of the images whose entries are sound, whatever their files."""
    infos = [source.info(index) for index in range(len(source))]
    first: dict[Id, ImageInfo] = {}
    # Nobody knows to which of them the annotations belong.
    ambiguous = {info.id for info in infos if first.setdefault(info.id, info) != info}
    seen: set[Id] = set()
    sound = []
    for index, info in enumerate(infos):
        if min(info.height, info.width) < 1:
            findings[Kind.NO_SIZE].append(f"{info.file_name}: {info.width}x{info.height}")
        elif info.id in ambiguous:
            findings[Kind.SHARED_ID].append(f"{info.file_name}: id {info.id}")
        elif info.id in seen:
            findings[Kind.REPEATED_IMAGE].append(f"{info.file_name}: id {info.id}")
        else:
            seen.add(info.id)
            sound.append(index)
    return sound


def with_sound_files(source: FileSource, indices: list[int], findings: Findings) -> list[int]:
    """Those of the images whose file is there and has the annotated size."""

    def look(index: int) -> tuple[Kind, str] | None:
        try:
            path = source.path(index)
        except ImageError:
            return Kind.ELSEWHERE, ""
        return _file_problem(path, source.info(index))

    # Around all threads, since filters belong to the process: theirs overlap, and this one ends them.
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        problems = list(pool.map(look, indices))
    sound = []
    for index, problem in zip(indices, problems, strict=True):
        if problem is None:
            sound.append(index)
        else:
            findings[problem[0]].append(f"{source.info(index).file_name}{problem[1]}")
    return sound


def _file_problem(path: Path, info: ImageInfo) -> tuple[Kind, str] | None:
    """What `decode_image` would find wrong, or a size that differs from the entry's."""
    try:
        height, width = upright_size(path)
    except ImageError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return Kind.NO_FILE, ""
        return Kind.BAD_HEADER, str(error).removeprefix(str(path))
    if (width, height) != (info.width, info.height):
        return Kind.OTHER_SIZE, f": {width}x{height}, annotated {info.width}x{info.height}"
    return None
