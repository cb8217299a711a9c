"""Writes the page of `comask infer`: all results of a folder, which a browser filters without a server.

`index.html` lies in the folder of results; everything that it loads lies in the folder `page` beside it:

- `result_*.js` and `result_page.css`: the program of the page, from this package;
- `summary.js`: the classes, the thresholds, and the inputs that failed;
- `results-0001.js`, …: what filters and sorting need of `_PART` images each;
- for each image: `000001.thumb.jpg`, `000001.view.jpg`, and `000001.js` with boxes and masks, which the
  browser loads when the image comes into sight.

A browser lets no page that was opened as a file read other files, but it runs scripts and shows pictures.
So the data are scripts, each a call of a function in `result_data.js`, where their form is described.
Pictures have numbers, since a file name may hold what an address may not.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from comask.errors import ComaskError, one_line
from comask.files import write_picture, write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from comask.structures import Detections
    from comask.timeline import Timeline

PAGE = "index.html"
_FOLDER = "page"
_TEMPLATE = Path(__file__).with_name("result_page.html.jinja")
_PROGRAM = ("result_page.css", "result_data.js", "result_grid.js", "result_view.js")
_SUMMARY = f"{_FOLDER}/summary.js"  # an index.html without this word is somebody else's
_WRITTEN = re.compile(r"\d{6,}\.(js|thumb\.jpg|view\.jpg)|results-\d{4,}\.js|summary\.js")
_PART = 1000  # images in one file of `results-0001.js`, …; no more of them are held in memory
_THUMB_SIDE, _VIEW_SIDE = 320, 2048  # a picture's longer side in pixels at most
_THUMB_QUALITY, _VIEW_QUALITY = 80, 88
_TOLERANCE = 0.5  # pixels of the view by which an outline may differ from the mask's


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What filters and sorting need of an image, or of the frame that stands for a video.

    Attributes:
        number: the number in the names of its files.
        name: the name that is shown, on one line.
        size: (width, height) in pixels.
        labels: [N] u32, the classes of its instances.
        scores: [N] f32, in 0..1.
        areas: [N] u32, the pixels of their masks.
        video: what `ResultPage.write_video` says of a video, else None.
    """

    number: int
    name: str
    size: tuple[int, int]
    labels: NDArray[np.uint32]
    scores: NDArray[np.float32]
    areas: NDArray[np.uint32]
    video: Mapping[str, Any] | None = None


class ResultPage:
    """Writes a page of results as they come, so that memory does not grow with their number.

    `write_image` and `write_video` may be called by several threads; the other methods by one.

    Args:
        folder: the folder of the results, for `index.html`.

    Raises:
        ComaskError: when the folder has an `index.html` of somebody else, which is kept; and here as in
            every method, when a file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._parts = folder, folder / _FOLDER
        self._numbers = itertools.count(1)
        self._entries: list[Entry] = []
        self._files: list[str] = []  # results-0001.js, … so far
        self._thresholds: float | tuple[float, ...] = 0.0
        self._classes: tuple[str, ...] = ()
        self._facts: Mapping[str, str] = {}
        index = folder / PAGE
        with self._writing():
            if index.exists() and (index.is_dir() or _SUMMARY.encode() not in index.read_bytes()):
                raise ComaskError(
                    f"--output {folder}: {PAGE} in it is not a page of comask infer; give another "
                    f"folder, or leave page out of --save"
                )
            if self._parts.exists() and not self._parts.is_dir():
                raise ComaskError(f"--output {folder}: {_FOLDER} in it is a file; remove it")

    def start(
        self,
        classes: Sequence[str],
        thresholds: float | tuple[float, ...],
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Removes the page of an earlier run, whose pictures would be mixed with the new ones.

        Args:
            classes: the name of each label.
            thresholds: the lowest score that is shown at first: one for all, or one per label.
            facts: what the page says of the run, such as its `backend`.
        """
        self._classes, self._thresholds, self._facts = tuple(classes), thresholds, facts or {}
        with self._writing():
            (self._folder / PAGE).unlink(missing_ok=True)
            self._parts.mkdir(parents=True, exist_ok=True)
            for path in self._parts.iterdir():
                if _WRITTEN.fullmatch(path.name):
                    path.unlink()

    def number(self) -> int:
        """Returns the number of the next image; they rise from 1."""
        return next(self._numbers)

    def write_image(
        self, number: int, name: str, pixels: NDArray[np.uint8], found: Detections
    ) -> Entry:
        """Writes an image's pictures, boxes and masks.

        Args:
            number: from `number`.
            name: the image's name or path, of any characters.
            pixels: u8 [H, W, 3], RGB.
            found: its detections.

        Returns:
            What `add` takes.
        """
        return self._write(number, name, pixels, found)

    def write_video(
        self,
        number: int,
        name: str,
        pixels: NDArray[np.uint8],
        found: Detections,
        timeline: Timeline,
        overlay: Path | None,
    ) -> Entry:
        """Writes what `write_image` writes, of the frame that stands for a video, and its timeline.

        Args:
            number: from `number`.
            name: the video's name or path.
            pixels: u8 [H, W, 3], RGB, the frame.
            found: the frame's detections.
            timeline: the detections of all frames.
            overlay: the overlay in the folder of the results, None without one.
        """
        entry = self._write(number, name, pixels, found, {"timeline": timeline.content()})
        address = None if overlay is None else quote(os.fsencode(overlay.name))
        return replace(
            entry,
            video={
                "frames": timeline.frames,
                "seconds": float(timeline.seconds),
                "best": sorted(timeline.best.items()),
                "overlay": address,
            },
        )

    def add(self, entry: Entry) -> None:
        """Puts an entry on the page, after those before."""
        self._entries.append(entry)
        if len(self._entries) == _PART:
            self._write_part()

    def finish(self, failures: Sequence[Mapping[str, str]], *, whole: bool = True) -> Path:
        """Writes the page of what was added.

        Args:
            failures: `file` and `error` of the inputs that failed.
            whole: whether all inputs were run; the page tells if the run ended early.

        Returns:
            The path of the page.
        """
        from comask.draw import class_color
        from comask.page import render

        if self._entries:
            self._write_part()
        summary = {
            "classes": [one_line(name) for name in self._classes],
            "colors": ["#{:02x}{:02x}{:02x}".format(*class_color(i)) for i in range(len(self._classes))],
            "thresholds": self._thresholds,
            "failures": [{name: one_line(text) for name, text in one.items()} for one in failures],
            "facts": {name: one_line(text) for name, text in self._facts.items()},
            "whole": whole,
        }  # fmt: skip
        self._write_script("summary.js", "summary", summary)
        index = self._folder / PAGE
        with self._writing():
            for name in _PROGRAM:
                write_whole(self._parts / name, Path(__file__).with_name(name).read_bytes())
            data = [f"{_FOLDER}/{name}" for name in self._files]
            write_whole(index, render(_TEMPLATE, title="Results", folder=_FOLDER, data=data))
        return index

    def _write(
        self,
        number: int,
        name: str,
        pixels: NDArray[np.uint8],
        found: Detections,
        more: Mapping[str, Any] | None = None,
    ) -> Entry:
        import cv2
        import numpy as np

        height, width = found.image_size
        view_size = _within(_VIEW_SIDE, width, height)
        view = cv2.resize(pixels, view_size, interpolation=cv2.INTER_AREA)
        thumb = cv2.resize(view, _within(_THUMB_SIDE, *view_size), interpolation=cv2.INTER_AREA)
        with self._writing():
            for kind, picture, quality in (
                ("view", view, _VIEW_QUALITY),
                ("thumb", thumb, _THUMB_QUALITY),
            ):
                path = self._parts / f"{number:06}.{kind}.jpg"
                write_picture(path, picture, "jpeg", quality=quality)
        masks = [_mask(found, index, view_size) for index in range(len(found))]
        content = {
            "size": view_size,
            "boxes": found.boxes_xyxy.astype(float).round(1).tolist(),
            "masks": [outline for _, outline in masks],
            **(more or {}),
        }
        self._write_script(f"{number:06}.js", "details", content, before=f"{number}, ")
        return Entry(
            number,
            one_line(name),
            (width, height),
            found.labels.astype(np.uint32),
            found.scores,
            np.array([area for area, _ in masks], np.uint32),
        )

    def _write_part(self) -> None:
        """Writes the entries that were added since the last call."""
        import numpy as np

        def column(values: Callable[[Entry], NDArray[Any]], kind: str) -> str:
            joined = np.concatenate([values(entry) for entry in self._entries]).astype(kind)
            return base64.b64encode(joined.tobytes()).decode("ascii")

        entries, name = self._entries, f"results-{len(self._files) + 1:04}.js"
        content = {
            "numbers": [entry.number for entry in entries],
            "names": [entry.name for entry in entries],
            "sizes": [entry.size for entry in entries],
            "counts": [len(entry.labels) for entry in entries],
            "labels": column(lambda entry: entry.labels, "<u4"),
            "scores": column(lambda entry: entry.scores, "<f4"),
            "areas": column(lambda entry: entry.areas, "<u4"),
            "videos": {entry.number: entry.video for entry in entries if entry.video},
        }
        self._write_script(name, "results", content)
        self._files.append(name)
        self._entries = []

    def _write_script(self, name: str, function: str, content: object, before: str = "") -> None:
        """Writes a file that calls a function of the page."""
        text = f"comask.{function}({before}{json.dumps(content, separators=(',', ':'))});\n"
        with self._writing():  # not durable, as pictures
            write_whole(self._parts / name, text.encode("ascii"), durable=False)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise ComaskError(f"{self._folder}: the page cannot be written: {reason}") from error


def _within(side: int, width: int, height: int) -> tuple[int, int]:
    """Returns (width, height) scaled down so that neither exceeds `side`."""
    scale = min(1.0, side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _mask(found: Detections, index: int, view_size: tuple[int, int]) -> tuple[int, str]:
    """Returns the area of a mask in pixels of the image, and its outlines in pixels of the view.

    The outlines pass through the centres of the mask's outermost pixels; holes have outlines of their
    own. Each is written as `compress_runs` writes runs, x and y in turn: from the second point on, y is
    the difference to the point before, and from the third on x as well. A space divides them.
    """
    import cv2
    import numpy as np

    from comask.segmentation import compress_runs

    left, top, crop = found.crop(index)
    if not crop.size:
        return 0, ""
    height, width = found.image_size
    scale = np.array([view_size[0] / width, view_size[1] / height])
    corner, tolerance = np.array([left + 0.5, top + 0.5]), _TOLERANCE / scale.min()
    found_outlines, _ = cv2.findContours(
        crop.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
    )
    outlines = []
    for outline in found_outlines:
        points = cv2.approxPolyDP(outline, tolerance, closed=True)[:, 0] + corner
        outlines.append(np.floor(points * scale).astype(np.int64).ravel())
    area = int(np.count_nonzero(crop))
    if not outlines:
        return area, ""
    counts = np.array([len(outline) for outline in outlines])
    return area, " ".join(compress_runs(np.concatenate(outlines), counts))
