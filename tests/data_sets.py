"""Data sets on disk as people have them: the shapes, with something about them changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comask.data.coco import write_coco
from comask.data.shapes import ShapesSource
from comask.data.source import InstanceSource

Content = dict[str, Any]
Change = Callable[[Content], None]


def shapes_set(folder: Path, change: Change = lambda content: None, images: int = 4) -> Path:
    """A folder with shapes, whose annotation file `change` edits."""
    write_coco(ShapesSource(num_images=images, seed=9), folder)
    edit(folder, change)
    return folder


def edit(folder: Path, change: Change) -> None:
    """Changes the annotation file of a data set."""
    file = folder / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def cut_off(folder: Path) -> Path:
    """Leaves the header of the first image whole and its pixels not, so that only decoding it tells."""
    file = min((folder / "images").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return file


def exact_results(source: InstanceSource) -> list[dict[str, Any]]:
    """Every object of a data set, found as it is annotated."""
    from comask.evaluate import Truth

    indices = list(range(len(source)))
    images = [source.info(index).id for index in indices]
    truth = Truth(source, indices).dataset
    return [
        {"image_id": images[a["image_id"] - 1],
         "category_id": source.categories[a["category_id"] - 1].id,
         "bbox": a["bbox"], "segmentation": a["segmentation"], "score": 1 - a["id"] / 1000}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]  # fmt: skip
