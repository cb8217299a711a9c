"""Writes any source to disk as a COCO data set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from comask.data.source import InstanceSource
from comask.errors import DataError
from comask.whole_file import whole_file, write_whole


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
    formats = Image.registered_extensions()
    if annotation_file.exists():
        raise DataError(f"{folder}: holds a data set already; give another folder")
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        annotation_file.parent.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for index in range(len(source)):
            info = source.info(index)
            with whole_file(folder / "images" / info.file_name, durable=False) as file:
                Image.fromarray(source.image(index)).save(
                    file, formats[Path(info.file_name).suffix]
                )
            images.append(dataclasses.asdict(info))
            annotations += source.annotations(index)
            advance()
        content = {
            "info": {"description": "written by comask"},
            "images": images,
            "annotations": annotations,
            "categories": [dataclasses.asdict(category) for category in source.categories],
        }
        write_whole(annotation_file, json.dumps(content).encode())  # last: then the set is whole
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
