"""Joins several data sets into one, whose classes are joined by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comask.data.coco import CocoSource
from comask.data.source import Category, Id


def join(sources: Sequence[CocoSource], classes: Sequence[Category] = ()) -> CocoSource:
    """Joins data sets into one with the classes and images of all.

    Classes of the same name become one. Ids stay where all sets agree on them; otherwise classes get new
    ids from 1 on, and images the number of their set as a prefix. Everything that is wrong with a set
    stays wrong in the joined one, so that `comask.data.check` finds it.

    Args:
        sources: at least one data set.
        classes: classes that the result has in any case, with these ids, such as those of the training
            data.
    """
    if len(sources) == 1 and (not classes or tuple(classes) == sources[0].categories):
        return sources[0]
    ids = _class_ids(sources, classes)
    shared = _share_ids(sources)
    folder = Path(os.path.commonpath([source.images.folder.absolute() for source in sources]))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, source in enumerate(sources, 1):
        below = Path(os.path.relpath(source.images.folder.absolute(), folder))
        class_ids: dict[object, Id] = {c.id: ids[c.name] for c in source.categories}
        seen: set[Id] = set()
        for index in range(len(source)):
            info = source.info(index)
            id_ = f"{number}/{info.id}" if shared else info.id
            file_name = (below / info.file_name).as_posix()
            images.append(dataclasses.asdict(info) | {"id": id_, "file_name": file_name})
            if info.id in seen:
                continue  # an image that is listed again has the same annotations
            seen.add(info.id)
            for annotation in source.annotations(index):
                changed = {"image_id": id_}
                category, own = annotation.get("category_id"), annotation.get("id")
                if isinstance(category, int | float | str):
                    changed["category_id"] = class_ids.get(category, f"{number}/{category}")
                if isinstance(own, int | str):
                    changed["id"] = f"{number}/{own}"
                annotations.append(annotation | changed)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": id_, "name": name} for name, id_ in ids.items()],
    }
    result = CocoSource(folder, content, [line for source in sources for line in source.unreadable])
    result.stray_annotations += [entry for s in sources for entry in s.stray_annotations]
    result.namesakes += tuple(category for source in sources for category in source.namesakes)
    return result


def _share_ids(sources: Sequence[CocoSource]) -> bool:
    """Returns whether images of different sets have the same id."""
    seen: set[Id] = set()
    for source in sources:
        own = {source.info(index).id for index in range(len(source))}
        if seen & own:
            return True
        seen |= own
    return False


def _class_ids(sources: Sequence[CocoSource], classes: Sequence[Category]) -> dict[str, Id]:
    """Returns the id of each class name, in the order of labels."""
    ids: dict[str, Id] = {category.name: category.id for category in classes}
    names: dict[Id, str] = {}
    agree = True
    for category in (category for source in sources for category in source.categories):
        same_id = ids.setdefault(category.name, category.id) == category.id
        same_name = names.setdefault(category.id, category.name) == category.name
        agree = agree and same_id and same_name
    return ids if agree or classes else {name: number for number, name in enumerate(ids, 1)}
