"""Chooses the images to calibrate with: images of every kind, and about equally many of each."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from comask.data.layouts import EXPECTED, parts_at
from comask.data.open_data import open_files
from comask.data.source import InstanceSource
from comask.data.survey import size_name
from comask.errors import CalibrationError, ImageError, one_line
from comask.media_files import kind_of_file
from comask.preprocess import FORMATS, Pixels, decode_image, upright_size

SQUARE = 1.1  # ratio of sides up to which an image is neither wide nor tall


@dataclass(frozen=True, slots=True)
class CalibrationImage:
    """An image that has been decoded once and can be decoded again.

    Attributes:
        name: the file's name in the data set or the folder.
        sha256: the SHA-256 of its pixels and their shape.
        decode: returns the pixels, u8 [h, w, 3] RGB.
    """

    name: str
    sha256: str
    decode: Callable[[], Pixels]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that may be chosen; `strata` are the kinds that it belongs to."""

    name: str
    strata: tuple[str, ...]
    decode: Callable[[], Pixels]


def choose_images(
    data: InstanceSource | Path, count: int, seed: int, *, report: Callable[[str], None]
) -> list[CalibrationImage]:
    """Returns images to calibrate with, the same for the same data and seed.

    The next image is always of the kind that was chosen least so far. The kinds are the shape, the length
    of the shorter side and, with annotations, the classes and COCO sizes of objects. So rare classes are
    included, and the share of a kind differs from its share in the data. A larger `count` appends images.

    Args:
        data: a data set, or a folder: a data set if it has annotations, otherwise the images in it.
        count: the number of images.
        seed: the seed that decides which images represent their kind.
        report: called with lines about problems of the data, and about too few images.

    Raises:
        CalibrationError: the data has no images, or `count` is below 1.
        DataError: an annotation file cannot be used.
    """
    if count < 1:
        raise CalibrationError(f"{count} images to calibrate with; expected at least 1")
    candidates = _of_folder(data, report) if isinstance(data, Path) else _of_source(data)
    chosen: dict[str, CalibrationImage] = {}  # by digest, since copies of an image add nothing
    unreadable = 0
    for candidate in _by_strata(candidates, seed):
        if len(chosen) == count:
            break
        try:
            pixels = candidate.decode()
        except ImageError as error:
            report(f"skipped: {one_line(error)}")
            unreadable += 1
            continue
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        chosen.setdefault(digest, CalibrationImage(candidate.name, digest, candidate.decode))
    if not chosen:
        raise CalibrationError(
            f"none of {len(candidates)} images can be used for calibration; give a data set or a folder "
            f"of images like those that the network will see"
        )
    if len(chosen) < count:
        report(
            f"calibration: {len(chosen)} images instead of {count}: the data has {len(candidates)}, of "
            f"which {unreadable} cannot be read; copies count once"
        )
    return list(chosen.values())


def _by_strata(candidates: list[Candidate], seed: int) -> Iterator[Candidate]:
    """Yields all candidates, each time one of the stratum that was chosen least so far."""
    waiting: dict[str, deque[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(candidates)).tolist():
        for stratum in candidates[index].strata:
            waiting.setdefault(stratum, deque()).append(index)
    chosen = dict.fromkeys(waiting, 0)
    taken: set[int] = set()
    while waiting:
        rarest = min(waiting, key=lambda stratum: chosen[stratum])
        index = waiting[rarest].popleft()
        if not waiting[rarest]:
            del waiting[rarest]
        if index in taken:
            continue
        taken.add(index)
        for stratum in candidates[index].strata:
            chosen[stratum] += 1
        yield candidates[index]


def _of_folder(folder: Path, report: Callable[[str], None]) -> list[Candidate]:
    if parts := parts_at(folder):
        split = "val" if parts.keys() == {"val"} else "train"
        return _of_source(open_files([str(folder)], split, report=report))
    return _of_files(folder, report)


def _of_source(source: InstanceSource) -> list[Candidate]:
    names = {category.id: category.name for category in source.categories}
    candidates = []
    for index in range(len(source)):
        info, annotations = source.info(index), source.annotations(index)
        strata = {f"class {names[annotation['category_id']]}" for annotation in annotations}
        strata |= {_object_size(annotation) for annotation in annotations} or {"no object"}
        kinds = (*sorted(strata), *_image_strata(info.height, info.width))
        candidates.append(Candidate(info.file_name, kinds, partial(source.image, index)))
    return candidates


def _of_files(folder: Path, report: Callable[[str], None]) -> list[Candidate]:
    try:
        files = sorted(entry for entry in folder.iterdir() if kind_of_file(entry) == "image")
    except OSError as error:
        raise CalibrationError(f"{folder}: cannot be listed: {error.strerror}") from error
    if not files:
        raise CalibrationError(
            f"{folder}: no images to calibrate with; expected files of a known format "
            f"({', '.join(FORMATS)}) or a data set: {EXPECTED}"
        )
    return [Candidate(p.name, _file_strata(p), partial(decode_image, p)) for p in files]


def _file_strata(path: Path) -> tuple[str, ...]:
    try:
        return _image_strata(*upright_size(path))
    except ImageError:  # Decoding the image will report it again.
        return ("unreadable header",)


def _image_strata(height: int, width: int) -> tuple[str, str]:
    ratio = width / height
    shape = "wide" if ratio > SQUARE else "tall" if ratio < 1 / SQUARE else "square"
    return f"{shape} image", f"shorter side from 2^{int(math.log2(min(height, width)))}"


def _object_size(annotation: dict[str, Any]) -> str:
    _, _, width, height = annotation["bbox"]
    area = annotation.get("area", width * height)
    return f"{size_name(area)} object"
