"""Recognises the layout of a data set, and reads it as COCO instances.

Every format becomes the content of a COCO file in memory, so that the same checks follow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from comask.data.coco import CocoSource, read_coco
from comask.errors import DataError

# The parts of a data set; a data set without parts has the only key `all`.
Parts = Mapping[str, Callable[[], CocoSource]]

_YEARS = ("2014", "2017")  # of COCO's images, in the names of its folders
COCO_FILE = "annotations/instances.json"
ROBOFLOW_FILE = "_annotations.coco.json"
# What tools call the parts, the most usual first. Images for tests serve for validation without others.
VALIDATION = ("val", "valid", "validation", "val2017", "val2014", "test")
TRAINING = ("train", "training", "train2017", "train2014", "trainval")
EXPECTED = (
    f"a COCO file (instances.json, or instances.json:IMAGES), or a folder with {COCO_FILE} and images/, "
    f"with COCO 2017's or CVAT's annotations/instances_*.json, with Roboflow's train/{ROBOFLOW_FILE}, "
    f"with YOLO's data.yaml, with Pascal VOC's JPEGImages/ and SegmentationObject/, or with LabelMe's "
    f"JSON files"
)


def read_data_set(path: Path, split: str) -> CocoSource:
    """Reads the data set at a path.

    Args:
        path: a folder, a file of COCO's, `FILE.json:IMAGES`, or a YAML file of YOLO's.
        split: `train` or `val`; a data set without parts has the same images for both.

    Raises:
        DataError: when there is no data set, when it lacks the part, or when it cannot be read.
    """
    parts = find_parts(path)
    opened = parts.get(split) or parts.get("all")
    if opened is None:
        raise DataError(f"{path}: has no images for {split}, only for {', '.join(parts)}")
    return opened()


def has_validation(path: Path) -> bool:
    """Returns whether the data set at a path names images for validation.

    Raises:
        DataError: when there is no data set.
    """
    return "val" in find_parts(path)


def find_parts(path: Path) -> Parts:
    """Returns the parts of the data set at a path: `train` and `val`, one of them, or `all`.

    Raises:
        DataError: when there is no data set.
    """
    if parts := parts_at(path):
        return parts
    if not os.path.exists(path):
        raise DataError(f"{path}: no such folder or file; expected {EXPECTED}")
    for above in path.parents[:2]:
        if _has_names(above):
            raise DataError(f"{path}: is a part of the data set {above}; give that folder")
    raise DataError(f"{path}: no data set found; expected {EXPECTED}")


def parts_at(path: Path) -> Parts:
    """Returns what `find_parts` does, and no parts where there is no data set."""
    if os.path.isfile(path):
        return _of_file(path)
    if os.path.isdir(path):
        return next(filter(None, (recognise(path) for recognise in (*_BY_NAME, _labelme))), {})
    if found := re.fullmatch(r"(.+\.json):(.+)", str(path), re.IGNORECASE | re.DOTALL):
        return {"all": partial(read_coco, Path(found[1]), Path(found[2]))}
    return {}


def _of_file(path: Path) -> Parts:
    if path.suffix.lower() in (".yaml", ".yml"):
        from comask.data.yolo import find_yolo

        return find_yolo(path)
    return {"all": partial(read_coco, path)} if path.suffix.lower() == ".json" else {}


def _coco(folder: Path) -> Parts:
    if (folder / COCO_FILE).is_file():
        return {"all": partial(read_coco, folder / COCO_FILE, folder / "images")}
    return {}


def _roboflow(folder: Path) -> Parts:
    if (file := folder / ROBOFLOW_FILE).is_file():
        return {"all": partial(read_coco, file, folder)}
    files = {f.parent.name: f for f in folder.glob(f"*/{ROBOFLOW_FILE}")}
    return _by_use(
        folder, {name: partial(read_coco, file, file.parent) for name, file in files.items()}
    )


def _cvat(folder: Path) -> Parts:
    """Recognises `annotations/instances_SUBSET.json`, which COCO 2017 has, too."""
    subsets = {
        file.stem.removeprefix("instances_"): file
        for file in folder.glob("annotations/instances_*.json")
    }
    return _by_use(
        folder,
        {
            # COCO's images have their place even if they are missing.
            name: partial(read_coco, file, folder / name if name.endswith(_YEARS) else None)
            for name, file in subsets.items()
        },
    )


def _yolo(folder: Path) -> Parts:
    from comask.data.yolo import find_yolo

    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (folder / name).is_file():
            return find_yolo(folder / name)
    return {}


def _voc(folder: Path) -> Parts:
    from comask.data.voc import find_voc

    nested = sorted([*folder.glob("VOC20??"), *folder.glob("VOCdevkit/VOC20??")])
    for place in (folder, *nested):
        if parts := find_voc(place):
            return _by_use(place, parts)
    return {}


def _labelme(folder: Path) -> Parts:
    from comask.data.labelme import holds_labelme, read_labelme

    named = {
        place.name: partial(read_labelme, place, folder)
        for place in sorted(folder.glob("*"))
        if place.name.lower() in (*TRAINING, *VALIDATION) and holds_labelme(place)
    }
    if named:
        return _by_use(folder, named)
    return {"all": partial(read_labelme, folder, folder)} if holds_labelme(folder) else {}


# These look at the names of files and folders, so that they are quick wherever they look.
_BY_NAME = (_coco, _roboflow, _cvat, _yolo, _voc)


def _has_names(folder: Path) -> bool:
    try:
        return any(recognise(folder) for recognise in _BY_NAME)
    except DataError:
        return False


def _by_use(place: Path, named: Parts) -> Parts:
    """Returns the parts for training and validation, by the names that tools give them.

    Args:
        place: the data set, for error messages.
        named: the parts by name. A single one whose name says nothing is for both.

    Raises:
        DataError: when there are several, and no name says what they are for.
    """
    found = {
        part: named[name]
        for part, names in (("train", TRAINING), ("val", VALIDATION))
        if (name := _first(names, named))
    }
    if found or not named:
        return found
    if len(named) > 1:
        raise DataError(
            f"{place}: has the parts {', '.join(sorted(named))}, of which none is called train or val; "
            f"rename them, or name one file instead of the folder"
        )
    return {"all": next(iter(named.values()))}


def _first(wanted: Iterable[str], names: Iterable[str]) -> str | None:
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in wanted if name in lower), None)
