"""Reads the files of a page of results, independently of the page's own program."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


def script(folder: Path, name: str, function: str) -> Any:
    """What a file of a page gives a function of it."""
    text = (folder / "page" / name).read_text("ascii")
    found = re.fullmatch(rf"comask\.{function}\((?:\d+, )?(.*)\);\n", text)
    assert found, text[:80]
    return json.loads(found[1])


def column(text: str, kind: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), kind)


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """By name: number, size, labels, scores, areas and, of a video, what is told of it."""
    found: dict[str, dict[str, Any]] = {}
    for file in re.findall(r'src="page/(results-\d+\.js)"', (folder / "index.html").read_text()):
        part = script(folder, file, "results")
        ends = np.cumsum(part["counts"])[:-1]
        columns = [
            np.split(column(part[name], kind), ends)
            for name, kind in (("labels", "<u4"), ("scores", "<f4"), ("areas", "<u4"))
        ]
        rows = zip(part["numbers"], part["names"], part["sizes"], *columns, strict=True)
        for number, name, size, labels, scores, areas in rows:
            found[name] = {
                "number": number,
                "size": tuple(size),
                "labels": labels,
                "scores": scores,
                "areas": areas,
                "video": part["videos"].get(str(number)),
            }
    return found


def outline(text: str) -> NDArray[np.int32]:
    """[N, 2]: COCO's numbers, read one bit after the other."""
    numbers: list[int] = []
    bits: list[int] = []
    for character in text:
        value = ord(character) - 48
        bits += [value >> place & 1 for place in range(5)]
        if not value & 32:
            number = sum(bit << place for place, bit in enumerate(bits)) - (bits[-1] << len(bits))
            numbers.append(number + numbers[-2] if len(numbers) > 2 else number)
            bits = []
    return np.array(numbers, np.int32).reshape(-1, 2)


def filled(text: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels [H, W] of a mask's outlines; what lies within an outline in another one is a hole."""
    canvas = np.zeros(size[::-1], bool)
    for part in text.split():
        points = [outline(part)]
        inside = cv2.fillPoly(np.zeros(canvas.shape, np.uint8), points, 1).astype(bool)
        edge = cv2.polylines(np.zeros(canvas.shape, np.uint8), points, True, 1).astype(bool)
        if canvas[inside].any():
            canvas &= ~inside | edge
        else:
            canvas |= inside
    return canvas
