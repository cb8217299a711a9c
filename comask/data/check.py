"""Finds the problems of a data set before training instead of hours into it.

Training and evaluation can use everything that `sound_part` returns.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from comask.data.check_annotations import Annotations, changed_annotations
from comask.data.problems import EXAMPLES, NOTES, Findings, Kind, Problem, describe
from comask.data.source import Category, Id, ImageInfo, InstanceSource
from comask.errors import DataError, ImageError, one_line
from comask.preprocess import upright_size

_THREADS = 16  # reading headers is mostly waiting for the disk


@runtime_checkable
class FileSource(InstanceSource, Protocol):
    """A source whose images are files."""

    def path(self, index: int) -> Path:
        """Returns the path of image `index`.

        Raises:
            ImageError: when the file must not be read.
        """


def sound_images(source: InstanceSource, findings: Findings) -> list[int]:
    """Returns the indices of the images whose entries are sound; files are not checked."""
    infos = [source.info(index) for index in range(len(source))]
    first: dict[Id, ImageInfo] = {}
    # If images share an id, it is unknown to which of them the annotations belong.
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
    """Returns those of the images whose file exists and has the annotated size."""
    # The threads change the process's filters at overlapping times; this block restores them at the end.
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        problems = list(pool.map(partial(_file_problem, source), indices))
    sound = []
    for index, problem in zip(indices, problems, strict=True):
        if problem is None:
            sound.append(index)
        else:
            findings[problem[0]].append(f"{source.info(index).file_name}{problem[1]}")
    return sound


def _file_problem(source: FileSource, index: int) -> tuple[Kind, str] | None:
    """Returns a fault that `decode_image` would find, or a size that differs from the entry's."""
    info = source.info(index)
    try:
        path = source.path(index)
    except ImageError:
        return Kind.ELSEWHERE, ""
    try:
        height, width = upright_size(path)
    except ImageError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return Kind.NO_FILE, ""
        return Kind.BAD_HEADER, str(error).removeprefix(str(path))
    if (width, height) != (info.width, info.height):
        return Kind.OTHER_SIZE, f": {width}x{height}, annotated {info.width}x{info.height}"
    return None


def sound_part(
    source: InstanceSource, *, boxes: Literal["annotated", "mask"] = "annotated"
) -> tuple[InstanceSource, list[Problem]]:
    """Returns the part of a data set that training can use, and the problems of the rest.

    If the source has files, that is, a method `path(index)`, their headers are checked as well.
    Annotations of images that are left out are left out with them and not counted.

    Args:
        source: the data set, which is read completely except for its pixels.
        boxes: `mask` takes each box from the bounds of its mask.

    Returns:
        (sound part, problems). The sound part is a view without the unsound images and annotations;
        boxes are clipped, polygons of fewer than 3 points are left out, and ids are unique. If nothing
        has to be left out or changed, it is the source itself. The problems have a fixed order.

    Raises:
        DataError: when no image remains.
    """
    findings: Findings = {kind: [] for kind in Kind}
    indices = sound_images(source, findings)
    if isinstance(source, FileSource):
        indices = with_sound_files(source, indices, findings)
    if isinstance(source, _StraySource):
        findings[Kind.UNREADABLE] += source.unreadable
        for stray in source.stray_annotations:
            id_, image = shortened(stray.get("id")), shortened(stray.get("image_id"))
            findings[Kind.UNKNOWN_IMAGE].append(f"annotation {id_}: image {image}")
        for category in source.namesakes:
            findings[Kind.NAMESAKE].append(f"{category.id} ({category.name})")
    changed = changed_annotations(source, indices, findings, boxes=boxes)
    _look_for_crowds(source, indices, changed, findings)
    problems = [
        Problem(
            kind=kind.words,
            count=len(cases),
            examples=tuple(map(one_line, cases[:EXAMPLES])),
            consequence=kind.consequence,
            remedy=kind.remedy,
        )
        for kind, cases in findings.items()
        if cases
    ]
    if not indices:
        why = "; ".join(line.removeprefix("data: ") for line in describe(problems))
        raise DataError(
            f"no image of the data set can be used; check that its annotation file and image folder "
            f"belong together ({why or 'the file lists no images'})"
        )
    if not changed and not any(cases for kind, cases in findings.items() if kind not in NOTES):
        return source, problems
    if isinstance(source, FileSource):
        return _SoundFiles(source, indices, changed), problems
    return _SoundPart(source, indices, changed), problems


@runtime_checkable
class _StraySource(Protocol):
    """A source that knows the annotations and categories of its file that it does not use."""

    stray_annotations: Annotations
    namesakes: tuple[Category, ...]
    unreadable: tuple[str, ...]


def _look_for_crowds(
    source: InstanceSource,
    indices: list[int],
    changed: dict[int, Annotations],
    findings: Findings,
) -> None:
    """Adds the crowds to the findings if most annotations are crowds, as in some tools' exports."""
    crowds, total = [], 0
    for index in indices:
        annotations = changed.get(index)
        for annotation in source.annotations(index) if annotations is None else annotations:
            total += 1
            if annotation.get("iscrowd"):
                id_ = shortened(annotation.get("id"))
                crowds.append(f"{source.info(index).file_name} annotation {id_}")
    if len(crowds) > total / 2:
        findings[Kind.MOSTLY_CROWDS] += crowds


class _SoundPart:
    """A view of some images of a source, with corrected annotations where necessary."""

    def __init__(
        self, source: InstanceSource, indices: list[int], changed: dict[int, Annotations]
    ) -> None:
        self.categories = source.categories
        self._source, self._indices, self._changed = source, indices, changed

    def __len__(self) -> int:
        return len(self._indices)

    def info(self, index: int) -> ImageInfo:
        return self._source.info(self._indices[index])

    def image(self, index: int) -> NDArray[np.uint8]:
        return self._source.image(self._indices[index])

    def annotations(self, index: int) -> Annotations:
        original = self._indices[index]
        changed = self._changed.get(original)
        return self._source.annotations(original) if changed is None else changed


class _SoundFiles(_SoundPart):
    """A view of some images of a source whose images are files."""

    _source: FileSource

    def path(self, index: int) -> Path:
        return self._source.path(self._indices[index])
