"""What `comask infer` writes for images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import click

from comask.bundle import MANIFEST
from comask.cli.threshold import FOR_TOOLS, Threshold
from comask.errors import ComaskError, ImageError
from comask.files import is_folder_fault, write_picture, write_whole
from comask.media_files import JPEG_SUFFIXES
from comask.parallel import ordered_map

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from comask.data.source import Category
    from comask.result_page import Entry, ResultPage
    from comask.runtime.images import ImageResult
    from comask.structures import Detections

IMAGE_KINDS = ("overlay", "masks", "coco", "labels", "page", *FOR_TOOLS)
_FILES = ("detections.json", "images.json", "dataset.json", "labelstudio.json", "labelstudio.xml")
QUALITY = 90  # of a JPEG overlay, where nothing is said

OverlayFormat = Literal["auto", "jpeg", "png"]
_SUFFIXES: Mapping[OverlayFormat, str] = {"jpeg": "jpg", "png": "png"}

_Named: TypeAlias = "tuple[ImageResult[Path], str, int]"


@dataclass(frozen=True, slots=True)
class OverlayFiles:
    """How overlays of images are written.

    Attributes:
        format: `auto` writes a JPEG for a JPEG, and a PNG for any other image.
        quality: of JPEG files, from 1 to 100; None for `QUALITY`.
    """

    format: OverlayFormat
    quality: int | None

    def check(self, kinds: set[str], images: list[Path]) -> None:
        """Refuses what would have no effect.

        Raises:
            click.UsageError: when no overlay would be written so.
        """
        given = "--quality" if self.quality is not None else "--overlay-format"
        if self.quality is None and self.format == "auto":
            return
        if "overlay" not in kinds:
            raise click.UsageError(f"{given}: no overlay is written; add overlay to --save")
        if not images:
            raise click.UsageError(f"{given}: concerns images, and there are only videos")
        if self.quality is not None and "jpeg" not in map(self.format_of, images):
            raise click.UsageError(
                "--quality: no overlay would be a JPEG; add --overlay-format jpeg"
            )

    def format_of(self, image: Path) -> OverlayFormat:
        """Returns the format of an image's overlay: `jpeg` or `png`."""
        if self.format != "auto":
            return self.format
        return "jpeg" if image.suffix.lower() in JPEG_SUFFIXES else "png"

    def write(self, path: Path, overlay: NDArray[Any], image: Path) -> None:
        """Writes an overlay to `path` with a suffix for its format."""
        kind = self.format_of(image)
        options: dict[str, Any] = {"compress_level": 1}  # three times as fast as 6, 6 % larger
        if kind == "jpeg":  # with full chroma, as lines and letters are one or two pixels wide
            options = {"quality": self.quality or QUALITY, "subsampling": 0}
        write_picture(path.with_name(f"{path.name}.{_SUFFIXES[kind]}"), overlay, kind, **options)


class ImageResults:
    """Writes the results of images that `--save` asks for.

    Args:
        folder: the folder of the results, created if it does not exist.
        kinds: names from `IMAGE_KINDS`.
        threshold: the lowest score that is drawn, and that other tools get.
        overlays: how overlays are written.
        page: gets the images, if `page` is among the kinds.

    Attributes:
        detections: the number of detections.
        left_out: the number of those that other tools do not get, since their mask has no pixel.

    Raises:
        ComaskError: when nothing can be written there, as on a full disk, or the folder holds a job.
    """

    def __init__(
        self,
        folder: Path,
        kinds: set[str],
        threshold: Threshold,
        overlays: OverlayFiles,
        page: ResultPage | None = None,
    ) -> None:
        self._folder, self._kinds, self._threshold = folder, kinds, threshold
        self._overlays, self._page = overlays, page
        self._coco: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._categories: tuple[Category, ...] = ()
        self._taken: set[str] = set()
        self.detections = self.left_out = 0
        if folder.is_file():
            raise ComaskError(f"--output {folder}: is a file; --output is a folder")
        if (folder / MANIFEST).exists():
            raise ComaskError(f"--output {folder}: holds a bundle; give another folder")
        if (folder / "job.json").exists():
            raise ComaskError(f"--output {folder}: holds a job; give another folder")
        for name in _FILES:  # before an hour's work, not after
            if (folder / name).is_dir():
                raise ComaskError(f"--output {folder}: {name} in it is a folder; remove it")
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(
        self, results: Iterable[ImageResult[Path]]
    ) -> Iterator[tuple[Path, ImageError | None]]:
        """Draws and writes results in several threads, while the caller's thread takes the next ones.

        Yields:
            each image's path, in order, and why it has no results or they cannot be written, if so.

        Raises:
            ComaskError: when no further results can be written to the folder.
        """
        for (result, _, _), written in ordered_map(self._write_one, map(self._named, results)):
            try:
                entries, shown = written.result()
            except ImageError as error:
                yield result.item, error
                continue
            # in one place, so that an interruption never leaves an image in only one of the two files
            number = len(self._images) + 1
            self._coco += [{**entry, "image_id": number} for entry in entries]
            height, width = result.detections.image_size
            self._images.append(
                {"id": number, "file_name": str(result.item), "width": width, "height": height}
            )
            self.detections += len(result.detections)
            self._categories = self._categories or _categories(result.detections)
            if self._page and shown:
                self._page.add(shown)
            yield result.item, None

    def _named(self, result: ImageResult[Path]) -> _Named:
        """Returns a result, the name of its files and its number on the page, in the order of images."""
        name = "" if result.error else self.unique(result.item.name)
        return result, name, self._page.number() if name and self._page else 0

    def _write_one(self, named: _Named) -> tuple[list[dict[str, Any]], Entry | None]:
        """Writes the files of one image.

        Returns:
            Its COCO results without the image's number, and what the page shows of it.
        """
        from comask.draw import draw_overlay

        result, name, number = named
        path, pixels, found = result.item, result.pixels, result.detections
        assert pixels is not None
        with self._writing(path):
            if "overlay" in self._kinds:
                overlay = draw_overlay(pixels, found[found.reach(self._threshold)])
                self._overlays.write(self._folder / f"{name}.overlay", overlay, path)
            if "masks" in self._kinds:
                write_picture(self._folder / f"{name}.mask.png", _instance_map(found), "png")
            if "labels" in self._kinds:
                lines = _label_lines(found).encode()
                write_whole(self._folder / f"{name}.labels.txt", lines, durable=False)
            page = self._page
            shown = page.write_image(number, str(path), pixels, found) if page else None
        return found.to_coco(0) if self._kinds & {"coco", *FOR_TOOLS} else [], shown

    @property
    def images(self) -> int:
        """The number of images with results."""
        return len(self._images)

    def finish(self) -> None:
        """Writes the files that cover all images."""
        with self._writing(self._folder):
            if "coco" in self._kinds:
                for file, content in (("detections", self._coco), ("images", self._images)):
                    write_whole(self._folder / f"{file}.json", json.dumps(content).encode())
            if self._images and self._kinds & {*FOR_TOOLS}:
                self._write_for_tools()

    def _write_for_tools(self) -> None:
        from comask.exchange import FolderResults, ImageInfo, write_coco_dataset
        from comask.label_studio import write_label_studio

        images = [ImageInfo(**image) for image in self._images]
        results = FolderResults.of(images, self._coco, self._categories, threshold=self._threshold)
        if "dataset" in self._kinds:
            self.left_out = write_coco_dataset(results, self._folder / "dataset.json")
        if "labelstudio" in self._kinds:
            tasks = self._folder / "labelstudio.json"
            self.left_out = write_label_studio(results, tasks, tasks.with_suffix(".xml"))

    def unique(self, name: str) -> str:
        """Returns `name`, or a numbered name if a file of another folder has it already."""
        unique, number = name, 2
        while unique in self._taken:
            unique, number = f"{name}.{number}", number + 1
        self._taken.add(unique)
        return unique

    @contextlib.contextmanager
    def _writing(self, source: Path) -> Iterator[None]:
        """Turns an OSError into an error that names the folder, or the one source it concerns."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            if is_folder_fault(error) or source == self._folder:
                raise ComaskError(f"{self._folder}: results cannot be written: {reason}") from error
            where = f"{error.filename or self._folder}: {reason}"
            raise ImageError(f"{source}: its results cannot be written: {where}") from error


def _categories(found: Detections) -> tuple[Category, ...]:
    """Returns the classes, which the detections of a bundle always name."""
    from comask.data.source import Category

    ids, names = found.category_ids or (), found.class_names or ()
    return tuple(Category(id=id_, name=name) for id_, name in zip(ids, names, strict=True))


def _instance_map(found: Detections) -> Any:
    """Returns u16 [H, W]: 0 for background, else the number (from 1) of the best detection there."""
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
