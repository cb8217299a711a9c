"""From what `--data` says to a data set, checked where it comes from outside."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from comask.config import DataConfig
from comask.data.check import sound_part
from comask.data.coco import coco_source
from comask.data.problems import Problem
from comask.data.source import InstanceSource
from comask.errors import DataError

SHAPES = "shapes"  # as `--data` says it
SHAPES_VAL_SEED = 1_000_000  # far from training seeds: other images

logger = logging.getLogger(__name__)


def open_source(data: str, split: str, *, shapes_images: int, shapes_seed: int) -> InstanceSource:
    """The data set that `--data` names: a folder, or `shapes` made on the fly.

    `shapes` means the same wherever a command runs. A folder of that name is `./shapes`, and its mere
    `shapes` is answered with a line that says so.

    Raises:
        DataError: when the folder holds no data set.
    """
    if data == SHAPES:
        from comask.data.shapes import ShapesSource

        if (folder := Path.cwd() / SHAPES).is_dir():
            _tell_apart(folder)
        return ShapesSource(num_images=shapes_images, seed=shapes_seed)
    return coco_source(Path(data), split)


def training_sources(
    config: DataConfig, data: str, val: str | None, seed: int
) -> tuple[InstanceSource, list[int], InstanceSource, list[int], list[Problem]]:
    """The sound part of the training and of the validation data, and what was wrong with the rest.

    Args:
        config: sizes of `shapes`, and the share that is set aside without `val`.
        data: as `--data` has it.
        val: as `--val` has it; a seeded share of `data` without it, or other images with `shapes`.
        seed: of that share and of the shapes.

    Returns:
        the training source with indices into it, the validation source with indices, problems.

    Raises:
        DataError: when a folder holds no data set, the two differ in categories, or there are too few
            images to set some aside.
    """
    source, problems = _checked(data, "train", config.shapes_train, seed)
    everything = list(range(len(source)))
    if val is not None or data == SHAPES:
        val_source, more = _checked(val or data, "val", config.shapes_val, SHAPES_VAL_SEED)
        if val_source.categories != source.categories:
            raise DataError(f"--val {val}: its categories differ from those of --data {data}")
        if more != problems:  # or it is the same file
            problems += more
        return source, everything, val_source, list(range(len(val_source))), problems
    count = max(1, round(len(source) * config.val_fraction))
    if count >= len(everything):
        raise DataError(
            f"--data {data}: too few images ({len(everything)}) to set {count} aside for "
            f"validation; name some by --val"
        )
    order = np.random.default_rng(seed).permutation(everything).tolist()
    return source, sorted(order[count:]), source, sorted(order[:count]), problems


def data_digest(*parts: tuple[InstanceSource, list[int]]) -> str:
    """What tells whether a run goes on with the images it began with: their ids and the classes."""
    content = [
        ([(c.id, c.name) for c in source.categories], [source.info(i).id for i in indices])
        for source, indices in parts
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _checked(
    data: str, split: str, shapes_images: int, shapes_seed: int
) -> tuple[InstanceSource, list[Problem]]:
    source = open_source(data, split, shapes_images=shapes_images, shapes_seed=shapes_seed)
    if data == SHAPES:  # sound by construction, and rendered when asked for
        return source, []
    try:
        return sound_part(source)
    except DataError as error:
        raise DataError(f"{data}: {error}") from error


@functools.cache  # once for all the sets that a command opens
def _tell_apart(folder: Path) -> None:
    logger.warning(
        "%s is the built-in data set here, not the folder %s: write ./%s for that",
        SHAPES, folder, SHAPES,
    )  # fmt: skip
