"""Joins several data sets into one, whose classes are joined by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comask.data.coco import CocoSource
from comask.data.source import Id


def join(sources: Sequence[CocoSource]) -> CocoSource:
    """Joins data sets into one with the classes and images of all.

    Classes of the same name become one. Ids stay where all sets agree on them; otherwise classes get new
    ids from 1 on, and images the number of their set as a prefix.

    Args:
        sources: at least one data set.
    """
    if len(sources) == 1:
        return sources[0]
    class_ids = _class_ids(sources)
    infos = [[source.info(index) for index in range(len(source))] for source in sources]
    seen: set[Id] = set()
    shared = False
    for ids in ({info.id for info in part} for part in infos):
        shared = shared or bool(seen & ids)
        seen |= ids
    folder = Path(os.path.commonpath([source.images.folder.absolute() for source in sources]))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (source, part) in enumerate(zip(sources, infos, strict=True), 1):
        below = Path(os.path.relpath(source.images.folder.absolute(), folder))
        names = {category.id: category.name for category in source.categories}
        for index, info in enumerate(part):
            id_: Id = f"{number}/{info.id}" if shared else info.id
            file_name = (below / info.file_name).as_posix()
            images.append(dataclasses.asdict(info) | {"id": id_, "file_name": file_name})
            for annotation in source.annotations(index):
                category = annotation.get("category_id")
                known = isinstance(category, int | float | str) and category in names
                joined = class_ids[names[category]] if known else f"{number}/{category}"
                own = {"id": len(annotations) + 1, "image_id": id_, "category_id": joined}
                annotations.append(annotation | own)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": id_, "name": name} for name, id_ in class_ids.items()],
    }
    result = CocoSource(folder, content, [line for source in sources for line in source.unreadable])
    for source in sources:
        result.stray_annotations += source.stray_annotations
    return result


def _class_ids(sources: Sequence[CocoSource]) -> dict[str, Id]:
    """Returns the id of each class name, in the order of labels."""
    ids: dict[str, Id] = {}
    names: dict[Id, str] = {}
    agree = True
    for source in sources:
        for category in source.categories:
            same_id = ids.setdefault(category.name, category.id) == category.id
            same_name = names.setdefault(category.id, category.name) == category.name
            agree = agree and same_id and same_name
    return ids if agree else {name: number for number, name in enumerate(ids, 1)}
