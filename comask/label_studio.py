"""Writes detections as predictions for Label Studio: tasks, and the labelling configuration they fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from comask.draw import class_color
from comask.errors import DataError
from comask.exchange import FolderResults
from comask.files import whole_file, write_whole
from comask.masks import run_length_mask
from comask.segmentation import RunLengthMask

__all__ = ["local_files", "write_label_studio"]

IMAGE, BRUSH = "image", "brush"  # the names of the configuration's tags

# The kinds of lengths, as in Label Studio's own encoder; a run has the shortest that holds its length.
_LENGTH_BITS = np.array([3, 4, 8, 16])
_LONGEST = 1 << 16  # values in a run; longer ones are several


def write_label_studio(
    results: FolderResults,
    tasks: Path,
    configuration: Path,
    *,
    address: Callable[[str], str] | None = None,
    model_version: str = "comask",
) -> int:
    """Writes a task for each image, with a prediction of brush masks, and the labelling configuration.

    Each detection is a region with its own score; a task's score is their mean, 0 without any.
    Detections whose mask has no pixel are left out, since there would be nothing to see.

    Args:
        results: what was found.
        tasks: the JSON file of the tasks.
        configuration: the XML file, which a project needs before it takes the tasks.
        address: returns the address of an image, given its path below `results.folder`; None for
            `local_files(results.folder)`.
        model_version: the name under which Label Studio groups the predictions.

    Returns:
        The number of results that were left out.

    Raises:
        DataError: when a result has an unknown category or a segmentation that cannot be used.
        OSError: when a file cannot be written.
    """
    address = address or local_files(results.folder)
    write_whole(configuration, _configuration([c.name for c in results.categories]))
    left_out = 0
    with whole_file(tasks) as file:
        file.write(b"[")
        for place, (image, entries) in enumerate(results.found):
            instances = results.instances(image, entries)
            left_out += len(entries) - len(instances)
            regions = [
                {
                    "id": f"{image.id}-{number}",
                    "type": "brushlabels",
                    "from_name": BRUSH,
                    "to_name": IMAGE,
                    "original_width": image.width,
                    "original_height": image.height,
                    "image_rotation": 0,
                    "score": score,
                    "value": {
                        "format": "rle",
                        "rle": brush_rle(mask),
                        "brushlabels": [results.categories[label].name],
                    },
                }
                for number, (label, score, mask) in enumerate(instances, 1)
            ]
            mean = sum(instance.score for instance in instances) / max(len(instances), 1)
            task = {
                "data": {IMAGE: address(image.file_name)},
                "predictions": [{"model_version": model_version, "score": mean, "result": regions}],
            }
            file.write((b",\n" if place else b"\n") + json.dumps(task).encode())
        file.write(b"\n]\n")
    return left_out


def local_files(folder: Path) -> Callable[[str], str]:
    """Returns what gives an image's address where Label Studio serves local files.

    Label Studio serves folders below its LOCAL_FILES_DOCUMENT_ROOT, never that one itself; the addresses
    hold if it is the parent of `folder`.
    """
    return lambda path: f"/data/local-files/?d={quote(f'{folder.name}/{path}'.lstrip('/'))}"


def brush_rle(mask: RunLengthMask) -> list[int]:
    """Encodes a mask as the brush of Label Studio stores it, as bytes 0..255.

    The format is that of https://github.com/thi-ng/umbrella, packages/rle-pack. Its values are the R, G,
    B and alpha of all pixels, row by row; here all four are 0 or 255. In bits, highest first, it has the
    number of values (32), the bits of a value minus 1 (5), and the bits of four kinds of lengths minus 1
    (4 each); then for each run a 1, the kind of its length (2), its length minus 1, and its value (8).

    Raises:
        DataError: when the image has 2**30 pixels or more, since 32 bits do not hold four times as many.
    """
    height, width = mask.size
    if height * width >= 2**30:
        raise DataError(
            f"an image of {width}x{height} pixels is too large for Label Studio's brush"
        )
    x, y, crop = mask.crop()
    # The transposed mask has, column by column, the runs that the mask has row by row.
    lengths = 4 * run_length_mask(y, x, crop.T, (width, height)).runs
    values = np.arange(len(lengths)) % 2 * 255
    parts = -(-lengths // _LONGEST)  # of each run; none of an empty run before the first pixel
    part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    lengths = np.minimum(np.repeat(lengths, parts) - part * _LONGEST, _LONGEST)
    kinds = np.searchsorted(1 << _LENGTH_BITS, lengths)
    length_bits = _LENGTH_BITS[kinds]
    runs = (4 + kinds << length_bits | lengths - 1) << 8 | np.repeat(values, parts)
    return _packed(
        np.concatenate(([4 * height * width, 8 - 1], _LENGTH_BITS - 1, runs)),
        np.concatenate(([32, 5, 4, 4, 4, 4], 1 + 2 + length_bits + 8)),
    )


def _packed(numbers: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[int]:
    """Returns bytes that hold each number in its length of bits, highest first, then zeros."""
    ends = np.cumsum(lengths)
    bits = np.zeros(ends[-1], np.uint8)
    for place in range(lengths.max()):
        there = lengths > place
        bits[ends[there] - 1 - place] = numbers[there] >> place & 1
    return np.packbits(bits).tolist()


def _configuration(names: list[str]) -> bytes:
    """Returns the XML of a project that shows images and paints these classes in comask's colours."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=IMAGE, value=f"${IMAGE}", zoom="true")
    brush = ElementTree.SubElement(view, "BrushLabels", name=BRUSH, toName=IMAGE)
    for label, name in enumerate(names):
        red, green, blue = class_color(label)
        colour = f"#{red:02x}{green:02x}{blue:02x}"
        ElementTree.SubElement(brush, "Label", value=name, background=colour)
    ElementTree.indent(view)
    text: bytes = ElementTree.tostring(view, encoding="utf-8")
    return text + b"\n"
