"""COCO results of a pipeline of the user's own, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comask.data.source import Id, ImageInfo, InstanceSource
from comask.errors import DataError
from comask.files import parse_json
from comask.runtime.parity.scores import Results
from comask.segmentation import read_segmentation

LARGEST = 1e9  # in pixels or as a score; integers beyond may not even fit a float
FIELDS = ("image_id", "category_id", "bbox", "score", "segmentation")


def read_results(path: Path, source: InstanceSource, indices: Sequence[int]) -> Results:
    """COCO results of those images of a data set; results of other images are left out.

    Categories that the data lack are kept: they match nothing.

    Raises:
        DataError: when the file holds no such results, naming entry and field.
    """
    try:
        entries = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"--results {path}: cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"--results {path}: expected a list of COCO results")
    infos = {info.id: info for info in map(source.info, indices)}
    found: dict[Id, list[dict[str, Any]]] = {number: [] for number in infos}
    for number, entry in enumerate(entries):
        try:
            checked = _checked(entry, infos)
        except DataError as error:
            raise DataError(f"--results {path}: entry {number}: {error}") from error
        if checked is not None:
            found[checked["image_id"]].append(checked)
    if entries and not any(found.values()):
        raise DataError(f"--results {path}: holds nothing on the {len(indices)} images evaluated")
    return [found[source.info(index).id] for index in indices]


def most_results(path: Path, source: InstanceSource, indices: Sequence[int]) -> int:
    """The most results that a file holds for one of the images; see `read_results`."""
    return max(map(len, read_results(path, source, indices)))


def _checked(entry: object, infos: dict[Id, ImageInfo]) -> dict[str, Any] | None:
    """An entry with its mask as compressed RLE; None where it is of another image."""
    if not isinstance(entry, dict):
        raise DataError(f"expected an object, got {entry!r:.80}")
    if missing := [name for name in FIELDS if name not in entry]:
        raise DataError(f"has no {missing[0]}; it needs {', '.join(FIELDS)}")
    for name in ("image_id", "category_id"):
        if type(entry[name]) not in (int, str):
            raise DataError(f"{name}: expected an integer or a string, got {entry[name]!r:.80}")
    if not _is_number(entry["score"]):
        raise DataError(f"score: expected a number, got {entry['score']!r:.80}")
    box = entry["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise DataError(f"bbox: expected four numbers x, y, width, height, got {box!r:.80}")
    if entry["image_id"] not in infos:
        return None
    info = infos[entry["image_id"]]
    mask = read_segmentation(entry["segmentation"], info.height, info.width)
    return {**{name: entry[name] for name in FIELDS}, "segmentation": mask.to_coco()}


def _is_number(value: object) -> bool:
    if type(value) not in (int, float):
        return False
    return -LARGEST <= value <= LARGEST  # type: ignore[operator] # false for NaN as well
