"""Opens the data sets that `--data` names, and checks those that come from outside."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from comask.config import DataConfig
from comask.data.check import sound_part
from comask.data.coco import coco_source
from comask.data.packed import PackedSource
from comask.data.problems import describe, without_objects
from comask.data.source import InstanceSource
from comask.errors import DataError

SHAPES = "shapes"  # the value of `--data`
SHAPES_VAL_SEED = 1_000_000  # far from training seeds, so that the images differ

logger = logging.getLogger(__name__)


def open_source(
    data: str,
    split: str,
    *,
    shapes_images: int,
    shapes_seed: int,
    boxes: Literal["annotated", "mask"] = "annotated",
    report: Callable[[str], None] | None = None,
) -> InstanceSource:
    """Opens the sound part of the data set that `--data` names: a folder, or the generated `shapes`.

    Every command opens its data here, so that all of them use the same part. `shapes` always means the
    generated data set. If the working directory has a folder of that name, a warning says that `./shapes`
    selects the folder.

    Args:
        data: the value of `--data`.
        split: `train` or `val`, which selects COCO's files.
        shapes_images: the number of images of `shapes`.
        shapes_seed: the seed of `shapes`.
        boxes: `mask` takes each box from the bounds of its mask.
        report: receives a line that begins with `data:` for each kind of problem; by default, the log
            does.

    Raises:
        DataError: when the folder has no data set, or none of its images can be used.
    """
    if data == SHAPES:  # its images are rendered on demand and need no check
        from comask.data.shapes import ShapesSource

        if (folder := Path.cwd() / SHAPES).is_dir():
            _tell_apart(folder)
        return ShapesSource(num_images=shapes_images, seed=shapes_seed)
    return open_folder(Path(data), split, boxes=boxes, report=report or logger.warning)


def open_folder(
    folder: Path,
    split: str,
    *,
    boxes: Literal["annotated", "mask"] = "annotated",
    report: Callable[[str], None],
) -> PackedSource:
    """Opens the sound part of the data set in a folder; the arguments are those of `open_source`."""
    source = coco_source(folder, split)
    try:
        part, problems = sound_part(source, boxes=boxes)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error
    for line in describe(problems):
        report(line)
    return PackedSource.of(part, source.images, problems)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """The data of a training run: the images for training and those for validation.

    Attributes:
        train: the data set of the training images.
        train_indices: the indices of the training images.
        val: the data set of the validation images, with the same categories.
        val_indices: the indices of the validation images.
    """

    train: InstanceSource
    train_indices: list[int]
    val: InstanceSource
    val_indices: list[int]

    @property
    def digest(self) -> str:
        """A hash of image ids and classes, by which a resumed run recognises its data."""
        content = [
            ([(c.id, c.name) for c in source.categories], [source.info(i).id for i in indices])
            for source, indices in ((self.train, self.train_indices), (self.val, self.val_indices))
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_training_data(config: DataConfig, data: str, val: str | None, seed: int) -> TrainingData:
    """Opens the sound part of the training and the validation data; problems of the rest are logged.

    Categories without any object are left out.

    Args:
        config: the sizes of `shapes`, and the share of images that is set aside without `val`.
        data: the value of `--data`.
        val: the value of `--val`. Without it, a random share of `data` is set aside; `shapes` generates
            other images.
        seed: the seed of that share and of the shapes.

    Raises:
        DataError: when a folder has no data set, the two differ in categories, too few images can be set
            aside, or no object is left to learn from.
    """
    reported: set[str] = set()  # --data and --val may be the same folder

    def report(line: str) -> None:
        if line not in reported:
            reported.add(line)
            logger.warning("%s", line)

    open_one = partial(open_source, boxes=config.boxes, report=report)
    source = open_one(data, "train", shapes_images=config.shapes_train, shapes_seed=seed)
    everything = list(range(len(source)))
    if val is None and data != SHAPES:
        count = max(1, round(len(source) * config.val_fraction))
        if count >= len(everything):
            raise DataError(
                f"--data {data}: too few images ({len(everything)}) to set {count} aside for "
                f"validation; name some with --val"
            )
        order = np.random.default_rng(seed).permutation(everything).tolist()
        chosen = sorted(order[count:]), sorted(order[:count])
        return _with_objects(TrainingData(source, chosen[0], source, chosen[1]), data)
    val_source = open_one(
        val or data, "val", shapes_images=config.shapes_val, shapes_seed=SHAPES_VAL_SEED
    )
    if val_source.categories != source.categories:
        raise DataError(f"--val {val}: its categories differ from those of --data {data}")
    indices = list(range(len(val_source)))
    return _with_objects(TrainingData(source, everything, val_source, indices), data)


def _with_objects(opened: TrainingData, data: str) -> TrainingData:
    """Returns the data without the categories that have no object in either part.

    Args:
        opened: both parts.
        data: the user's name for the training data.

    Raises:
        DataError: when no training image has an object.
    """
    if not isinstance(opened.train, PackedSource) or not isinstance(opened.val, PackedSource):
        return opened  # the generated `shapes`
    train, val = opened.train, opened.val
    if not any(
        not annotation.get("iscrowd")
        for index in opened.train_indices
        for annotation in train.annotations(index)
    ):
        why = "they have no annotations"
        if telling := [problem for problem in train.problems if problem.remedy]:
            most = max(telling, key=lambda problem: problem.count)
            why = f"{most.counted}; {most.remedy}"
        elif any(train.objects.values()):
            why = "all objects are in the part set aside for validation; name others with --val"
        raise DataError(
            f"--data {data}: no object to learn from in {len(opened.train_indices)} training images: "
            f"{why}"
        )
    used = {id_ for source in (train, val) for id_, count in source.objects.items() if count}
    kept = tuple(category for category in train.categories if category.id in used)
    if unused := [category.name for category in train.categories if category.id not in used]:
        logger.warning("%s", without_objects(unused, "left out"))
    if not any(val.objects.values()):
        logger.warning(
            "data: no object in the validation images: AP is n/a, and the last checkpoint is kept"
        )
    return replace(opened, train=train.with_categories(kept), val=val.with_categories(kept))


@functools.cache  # a command may open several data sets
def _tell_apart(folder: Path) -> None:
    logger.warning(
        "%s is the built-in data set here, not the folder %s: write ./%s for that",
        SHAPES, folder, SHAPES,
    )  # fmt: skip
