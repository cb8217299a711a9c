"""Opens the data sets that `--data` names, and checks those that come from outside."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from comask.config import DataConfig
from comask.data.check import sound_part
from comask.data.joined import join
from comask.data.layouts import has_validation, read_data_set
from comask.data.packed import PackedSource
from comask.data.problems import describe, without_objects
from comask.data.source import Category, InstanceSource
from comask.errors import DataError, one_line

# The values of `--data` that stand for generated images.
SHAPES, CLUTTER = "shapes", "shapes-clutter"
GENERATED = (SHAPES, CLUTTER)
SHAPES_VAL_SEED = 1_000_000  # far from training seeds, so that the images differ

logger = logging.getLogger(__name__)


def open_source(
    data: str | Sequence[str],
    split: str,
    *,
    shapes_images: int,
    shapes_seed: int,
    boxes: Literal["annotated", "mask"] = "annotated",
    report: Callable[[str], None] | None = None,
    classes: Sequence[Category] = (),
) -> InstanceSource:
    """Opens the sound part of the data sets that `--data` names, or a generated one.

    Every command opens its data here, so that all of them use the same part. `shapes` always means the
    generated data set. If the working directory has a folder of that name, a warning says that `./shapes`
    selects the folder.

    Args:
        data: the value of `--data`, or several, whose classes are joined by name; see
            `comask.data.layouts` for what each may be.
        split: `train` or `val`, for data sets that have such parts.
        shapes_images: the number of images of `shapes`.
        shapes_seed: the seed of `shapes`.
        boxes: `mask` takes each box from the bounds of its mask.
        report: receives a line that begins with `data:` for each kind of problem; by default, the log
            does.
        classes: the classes of the training data, whose ids those of the same name get.

    Raises:
        DataError: when there is no data set, none of its images can be used, or `classes` lacks a class.
    """
    names = _listed(data)
    generated = [name for name in names if name in GENERATED]
    if generated and len(names) > 1:
        raise DataError(
            f"{generated[0]} cannot be joined with other data: write it with 'comask shapes'"
        )
    if generated:  # the images are rendered on demand and need no check
        from comask.data.shapes import ShapesSource
        from comask.data.shapes_clutter import ShapesClutterSource

        if (Path.cwd() / generated[0]).is_dir():
            _tell_apart(generated[0])
        kind = ShapesSource if generated == [SHAPES] else ShapesClutterSource
        return kind(num_images=shapes_images, seed=shapes_seed)
    return open_files(names, split, boxes=boxes, report=report or logger.warning, classes=classes)


def open_files(
    data: Sequence[str],
    split: str,
    *,
    boxes: Literal["annotated", "mask"] = "annotated",
    report: Callable[[str], None],
    classes: Sequence[Category] = (),
) -> PackedSource:
    """Opens the sound part of data sets in files; the arguments are those of `open_source`."""
    sources = [read_data_set(Path(name), split) for name in data]
    known = {category.name for category in classes}
    for name, source in zip(data, sources, strict=True):
        new = [category.name for category in source.categories if category.name not in known]
        if classes and new:
            raise DataError(
                f"{name}: has the categories {', '.join(new)}, which the training data lacks; expected "
                f"some of {', '.join(sorted(known))}"
            )
    source = join(sources, classes)
    try:
        part, problems = sound_part(source, boxes=boxes)
    except DataError as error:
        raise DataError(f"{', '.join(data)}: {error}") from error
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


def open_training_data(
    config: DataConfig, data: str | Sequence[str], val: str | Sequence[str] | None, seed: int
) -> TrainingData:
    """Opens the sound part of the training and the validation data; problems of the rest are logged.

    Categories without any object are left out.

    Args:
        config: the sizes of `shapes`, and the share of images that is set aside without `val`.
        data: the values of `--data`.
        val: the values of `--val`. Without them, the validation parts of `data` are taken if each has
            one, else a random share of `data` is set aside; `shapes` generates other images.
        seed: the seed of that share and of the shapes.

    Raises:
        DataError: when there is no data set, validation has categories that training lacks, too few
            images can be set aside, or no object is left to learn from.
    """
    reported: set[str] = set()  # --data and --val may be the same folder

    def report(line: str) -> None:
        if line not in reported:
            reported.add(line)
            logger.warning("%s", line)

    data, val = _listed(data), _listed(val or ())
    name = " ".join(data)
    open_one = partial(open_source, boxes=config.boxes, report=report)
    generated = data[0] in GENERATED
    if not val and not generated and all(has_validation(Path(one)) for one in data):
        logger.info("validation on the part of %s for it", name)
        val = data
    source = open_one(data, "train", shapes_images=config.shapes_train, shapes_seed=seed)
    everything = list(range(len(source)))
    if not val and not generated:
        chosen = _set_aside(source, config, seed, name)
        return _with_objects(TrainingData(source, chosen[0], source, chosen[1]), name)
    val_source = open_one(
        val or data, "val", shapes_images=config.shapes_val, shapes_seed=SHAPES_VAL_SEED,
        classes=source.categories,
    )  # fmt: skip
    if val_source.categories != source.categories:
        raise DataError(f"--val {' '.join(val)}: its categories differ from those of --data {name}")
    indices = list(range(len(val_source)))
    return _with_objects(TrainingData(source, everything, val_source, indices), name)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _set_aside(
    source: InstanceSource, config: DataConfig, seed: int, name: str
) -> tuple[list[int], list[int]]:
    """Returns the images for training, and a random share of whole groups for validation.

    The share is not exceeded, unless even the smallest group is larger.
    """
    everything = list(range(len(source)))
    members = _groups([source.info(index).file_name for index in everything], config.val_group)
    count = max(1, round(len(everything) * config.val_fraction))
    aside: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(members)).tolist():
        if len(aside) + len(members[group]) <= count:
            aside += members[group]
    aside = aside or min(members, key=len)
    if len(aside) >= len(everything):
        kind = f" in {len(members)} groups of data.val_group" if config.val_group else ""
        raise DataError(
            f"--data {name}: too few images ({len(everything)}{kind}) to set {count} aside for "
            f"validation; name some with --val"
        )
    kept = set(aside)
    return [index for index in everything if index not in kept], sorted(aside)


def _groups(file_names: list[str], pattern: str) -> list[list[int]]:
    """Returns the indices of the files that belong together; a file without a match stays alone.

    Args:
        file_names: the paths of the images from the folder of the data.
        pattern: a regular expression; files belong together if its first group, or all that it matches,
            is the same. If it is empty, every file is alone.

    Raises:
        DataError: when the pattern matches no file.
    """
    if not pattern:
        return [[index] for index in range(len(file_names))]
    groups: dict[tuple[bool, str], list[int]] = {}
    alone = []
    for index, name in enumerate(file_names):
        found = re.search(pattern, name)
        if found is None:
            alone.append(name)
        text = found and (found.group(1) if found.re.groups else found.group())
        groups.setdefault((text is None, name if text is None else text), []).append(index)
    if len(alone) == len(file_names):
        raise DataError(f"data.val_group={pattern}: matches no file, such as {one_line(alone[0])}")
    if alone:
        logger.warning(
            "data: data.val_group=%s does not match %d files, such as %s: each is a group of its own",
            pattern, len(alone), one_line(alone[0]),
        )  # fmt: skip
    return list(groups.values())


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
def _tell_apart(name: str) -> None:
    logger.warning(
        "%s is the built-in data set here, not the folder %s: write ./%s for that",
        name, Path.cwd() / name, name,
    )  # fmt: skip
