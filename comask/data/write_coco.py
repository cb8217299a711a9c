"""Writes any source to disk as a COCO data set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from comask.data.source import InstanceSource
from comask.errors import DataError


def write_coco(
    source: InstanceSource, folder: Path, advance: Callable[[], None] = lambda: None
) -> None:
    """`folder/images/*` and `folder/annotations/instances.json`, as `coco_source` reads them.

    Args:
        source: to write.
        folder: made where it is missing.
        advance: called after each image.

    Raises:
        DataError: when it cannot be written, or holds a data set already.
    """
    annotation_file = folder / "annotations" / "instances.json"
    if annotation_file.exists():
        raise DataError(f"{folder}: holds a data set already; give another folder")
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        annotation_file.parent.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for index in range(len(source)):
            info = source.info(index)
            Image.fromarray(source.image(index)).save(folder / "images" / info.file_name)
            images.append(dataclasses.asdict(info))
            annotations += source.annotations(index)
            advance()
        content = {
            "info": {"description": "written by comask"},
            "images": images,
            "annotations": annotations,
            "categories": [dataclasses.asdict(category) for category in source.categories],
        }
        annotation_file.write_text(json.dumps(content))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
