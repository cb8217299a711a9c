"""Files that `comask-infer` writes of images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comask.errors import ComaskError, ImageError
from comask.files import is_folder_fault, whole_file, write_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from comask.preprocess import Pixels
    from comask.structures import Detections


class Results:
    """Writes what `--save` asks for of images.

    Args:
        folder: of the results, made where it is missing.
        kinds: of `KINDS`.
        threshold: lowest score that is drawn.

    Raises:
        ComaskError: when nothing can be written there, as on a full disk, or the folder is a job's.
    """

    def __init__(self, folder: Path, kinds: set[str], threshold: float) -> None:
        self._folder, self._kinds, self._threshold = folder, kinds, threshold
        self._coco: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._taken: set[str] = set()
        self.detections = 0
        if folder.is_file():
            raise ComaskError(f"--output {folder}: is a file; --output is a folder")
        if (folder / "job.json").exists():
            raise ComaskError(f"--output {folder}: holds a job; give another folder")
        for name in ("detections.json", "images.json"):  # before an hour's work, not after
            if (folder / name).is_dir():
                raise ComaskError(f"--output {folder}: {name} in it is a folder; remove it")
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, path: Path, pixels: Pixels, found: Detections) -> None:
        """The results of one image.

        Raises:
            ImageError: when those of this image cannot be written, as under too long a name.
        """
        from comask.draw import draw_overlay

        name = self.unique(path.name)
        with self._writing(path):
            if "overlay" in self._kinds:
                drawn = draw_overlay(pixels, found[found.scores >= self._threshold])
                self._write_png(f"{name}.overlay.png", drawn)
            if "masks" in self._kinds:
                self._write_png(f"{name}.mask.png", _instance_map(found))
            if "labels" in self._kinds:
                lines = _label_lines(found).encode()
                write_whole(self._folder / f"{name}.labels.txt", lines, durable=False)
        image_id = len(self._images) + 1
        entries = found.to_coco(image_id) if "coco" in self._kinds else []
        height, width = found.image_size
        # last, so that an interruption leaves images out whole
        self._coco += entries
        self._images.append(
            {"id": image_id, "file_name": str(path), "width": width, "height": height}
        )
        self.detections += len(found)

    @property
    def images(self) -> int:
        """How many there were."""
        return len(self._images)

    def finish(self) -> None:
        """The files that cover all images."""
        if "coco" in self._kinds:
            with self._writing(self._folder):
                for file, content in (("detections", self._coco), ("images", self._images)):
                    write_whole(self._folder / f"{file}.json", json.dumps(content).encode())

    def unique(self, name: str) -> str:
        """`name`, or a numbered one where another folder's file already took it."""
        unique, number = name, 2
        while unique in self._taken:
            unique, number = f"{name}.{number}", number + 1
        self._taken.add(unique)
        return unique

    def _write_png(self, name: str, pixels: NDArray[Any]) -> None:
        from PIL import Image

        # not durable: waiting for the disk takes as long as a GPU does for the image
        with whole_file(self._folder / name, durable=False) as file:
            Image.fromarray(pixels).save(file, format="PNG")

    @contextlib.contextmanager
    def _writing(self, source: Path) -> Iterator[None]:
        """Names what cannot be written: all results, or those of one source."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            if is_folder_fault(error) or source == self._folder:
                raise ComaskError(f"{self._folder}: results cannot be written: {reason}") from error
            where = f"{error.filename or self._folder}: {reason}"
            raise ImageError(f"{source}: its results cannot be written: {where}") from error


def _instance_map(found: Detections) -> Any:
    """u16 [H, W]: 0 background, else the number (from 1) of the best detection there."""
    import numpy as np

    instances = np.zeros(found.image_size, dtype=np.uint16)
    for number in range(len(found), 0, -1):
        x, y, crop = found.crop(number - 1)
        instances[y : y + crop.shape[0], x : x + crop.shape[1]][crop] = number
    return instances


def _label_lines(found: Detections) -> str:
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True)
    return "".join(
        f"{found.name(label)}\t{score:.4f}\t" + "\t".join(f"{edge:.2f}" for edge in box) + "\n"
        for label, score, box in rows
    )
