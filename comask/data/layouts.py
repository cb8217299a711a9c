"""Recognises the layout of a data set, and reads it as COCO instances.

Every format becomes the content of a COCO file in memory, so that the same checks follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from comask.data.coco import CocoSource, read_coco
from comask.errors import DataError

# The parts of a data set; a data set without parts has the only key `all`.
Parts = Mapping[str, Callable[[], CocoSource]]

COCO_FILE = "annotations/instances.json"
ROBOFLOW_FILE = "_annotations.coco.json"
# What tools call the part for validation, the most usual first. That for tests is taken if it is alone.
VALIDATION = ("val", "valid", "validation", "val2017", "test")
TRAINING = ("train", "training", "train2017")
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
        raise DataError(f"{path}: has no images for {split}, only for {' and '.join(parts)}")
    return opened()


def has_validation(path: Path) -> bool:
    """Returns whether the data set at a path names images for validation.

    Raises:
        DataError: when there is no data set.
    """
    return "val" in find_parts(path)


def is_data_set(path: Path) -> bool:
    """Returns whether the path has a data set, in whatever layout."""
    return bool(_parts(path))


def find_parts(path: Path) -> Parts:
    """Returns the parts of the data set at a path: `train` and `val`, one of them, or `all`.

    Raises:
        DataError: when there is no data set.
    """
    if parts := _parts(path):
        return parts
    if not path.exists():
        raise DataError(f"{path}: no such folder or file; expected {EXPECTED}")
    for above in path.parents[:2]:
        if _parts(above):
            raise DataError(f"{path}: is a part of the data set {above}; give that folder")
    raise DataError(f"{path}: no data set found; expected {EXPECTED}")


def _parts(path: Path) -> Parts:
    if ".json:" in str(path):
        file, _, images = str(path).partition(".json:")
        return {"all": partial(read_coco, Path(f"{file}.json"), Path(images))}
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        return {}
    for recognise in (_coco, _roboflow, _cvat, _yolo, _voc, _labelme):
        if parts := recognise(path):
            return parts
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
    return by_part({name: partial(read_coco, file, file.parent) for name, file in files.items()})


def _cvat(folder: Path) -> Parts:
    """Recognises `annotations/instances_SUBSET.json`, which COCO 2017 has, too."""
    subsets = {
        file.stem.removeprefix("instances_"): file
        for file in folder.glob("annotations/instances_*.json")
    }
    return by_part(
        {
            # COCO 2017's images have their place even if they are missing
            name: partial(read_coco, file, folder / name if name.endswith("2017") else None)
            for name, file in subsets.items()
        }
    )


def _yolo(folder: Path) -> Parts:
    from comask.data.yolo import find_yolo

    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (folder / name).is_file():
            return find_yolo(folder / name)
    return {}


def _voc(folder: Path) -> Parts:
    from comask.data.voc import find_voc

    nested = [folder, *folder.glob("VOC20??"), *folder.glob("VOCdevkit/VOC20??")]
    for place in nested:
        if parts := find_voc(place):
            return parts
    return {}


def _labelme(folder: Path) -> Parts:
    from comask.data.labelme import holds_labelme, read_labelme

    named = {
        name: partial(read_labelme, folder / name, folder)
        for name in (*TRAINING, *VALIDATION)
        if (folder / name).is_dir() and holds_labelme(folder / name)
    }
    if named:
        return by_part(named)
    return {"all": partial(read_labelme, folder, folder)} if holds_labelme(folder) else {}


def by_part(named: Mapping[str, Callable[[], CocoSource]]) -> Parts:
    """Returns the parts of a data set by the names that tools give them.

    Args:
        named: how to open each part. A single one whose name says nothing is for training and validation.

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
            f"the data set has the parts {', '.join(sorted(named))}, and none is called train or val: "
            f"name the annotation file of one"
        )
    return {"all": next(iter(named.values()))}


def _first(wanted: Iterable[str], names: Iterable[str]) -> str | None:
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in wanted if name in lower), None)
