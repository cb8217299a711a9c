"""`comask infer`: a bundle on images, folders, videos, cameras and streams."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from comask.bundle import MANIFEST
from comask.cli.command import command, option
from comask.cli.infer_video import WHERE, VideoOptions, run_video, split_inputs
from comask.cli.options import (
    Interruption,
    backend_option,
    check_outputs,
    json_option,
    predictor_options,
    write_json,
)
from comask.errors import ComaskError, ImageError, VideoError, one_line
from comask.files import is_folder_fault, whole_file, write_whole
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions, gpu_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from comask.runtime.images import ImageResult
    from comask.runtime.video import Where
    from comask.structures import Detections

VIDEOS = "Videos"  # heading of options
KINDS = ("overlay", "masks", "coco", "labels")


@command(moved=dict.fromkeys(("--runner", "--shard", "--format", "--actors"), "comask job"))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@option("--output", required=True, metavar="DIR", help="Folder of the results.")
@option("--save", default="overlay,coco", metavar="KINDS",
        help=f"Any of {','.join(KINDS)}. [overlay,coco]")  # fmt: skip
@option("--threshold", type=click.FloatRange(0, 1), default=0.5, metavar="P",
        help="Lowest score drawn in overlays. [0.5]")  # fmt: skip
@json_option
@backend_option
@predictor_options(batch=8)
@option("--every", type=click.IntRange(1), default=1, metavar="N", group=VIDEOS,
        help="Run every N-th frame only.")  # fmt: skip
@option("--track", is_flag=True, group=VIDEOS, help="Follow instances, with a fixed id and colour.")
@option("--decode", type=click.Choice(WHERE), default="auto", group=VIDEOS,
        help="Where to decode; gpu needs a tensorrt backend. [auto]")  # fmt: skip
@option("--encode", type=click.Choice(WHERE), default="auto", group=VIDEOS,
        help="Where to encode overlays: x264 or NVENC. [auto]")  # fmt: skip
def main(
    bundle: Path,
    inputs: tuple[str, ...],
    output: str,
    backend: str,
    save: str,
    threshold: float,
    how: LoadOptions,
    every: int,
    track: bool,
    decode: Where,
    encode: Where,
    json_file: str | None,
) -> None:
    """Run a bundle on images, folders, patterns, videos, camera:0 and streams (rtsp://…).

    A folder stands for the files directly in it; 'DIR/**/*.jpg' includes subfolders.

    Each result keeps the name of its input: photo.jpg.overlay.png, clip.mp4.overlay.mp4, clip.mp4.jsonl
    (one line per frame); detections.json holds the COCO results of all images, and images.json their
    ids. Inputs that cannot be read are skipped; the exit code is then 1.

    \b
    comask infer bundle photos 'more/**/*.jpg' clip.mp4 --output results
    """
    check_outputs(made=output, json=json_file)
    if "://" in output:
        raise click.UsageError(f"--output {output}: addresses are for comask job")
    folder = Path(output)
    kinds = _kinds(save)
    images, videos = split_inputs(inputs)
    gpu = gpu_index(how.device)
    options = VideoOptions(
        folder, kinds, threshold, how.max_batch, every, track, decode, encode, gpu
    )
    options.check(videos)
    results = Results(folder, kinds, threshold)
    failures = Failures()
    stop = Interruption()
    seconds, reports = 0.0, list[dict[str, Any]]()
    try:
        with Predictor.open(bundle, backend, how) as predictor:
            click.echo(f"backend {predictor.stages.backend}", err=True)
            if images:
                seconds = _run_images(predictor, images, results, failures, stop)
            whole = not stop.signal  # a later signal does not change this
            reports = _run_videos(predictor, videos, results, failures, options, stop)
        to_stderr = json_file == "-"
        if images:
            begin = "" if whole else "interrupted after "
            click.echo(
                f"{begin}{results.images} of {len(images)} images in {seconds:.1f} s "
                f"({results.images / seconds:.1f} images/s), {results.detections} detections in "
                f"{one_line(output)}",
                err=to_stderr,
            )
        for report in reports:
            click.echo(_video_line(report), err=to_stderr)
        if whole and results.images and not results.detections:
            click.echo(
                "nothing was found: train longer, or export again with a lower --score-threshold",
                err=True,
            )
    finally:
        failures.tell()  # also after an error
    write_json(
        json_file,
        {
            "images": results.images,
            "detections": results.detections,
            "videos": reports,
            "failures": failures.entries,
            "seconds": seconds,
            "backend": predictor.stages.backend,
            "interrupted": bool(stop.signal),
        },
    )
    if stop.signal:
        sys.exit(128 + stop.signal)
    if failures.entries:
        sys.exit(1)


class Failures:
    """Inputs that were skipped or whose results are incomplete.

    Attributes:
        entries: `file` and `error` of each.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, str]] = []
        self._lines: list[str] = []

    def add(self, kind: Literal["skipped", "incomplete"], file: str, error: str) -> None:
        """Records one input; the file's name is put before an `error` that lacks it."""
        text = one_line(error if error.startswith(file) else f"{file}: {error}")
        self.entries.append({"file": file, "error": text})
        self._lines.append(f"{kind}: {text}")

    def tell(self) -> None:
        """Prints a line per input, after everything else, so that the lines are seen."""
        for line in self._lines:
            click.echo(line, err=True)


def _run_images(
    predictor: Predictor,
    files: list[Path],
    results: Results,
    failures: Failures,
    stop: Interruption,
) -> float:
    """Runs the images until `stop`; returns the seconds it took."""
    from comask.progress import Progress

    started = time.perf_counter()
    try:
        with stop.on_signal(), Progress("inferring", len(files), unit="images") as progress:
            for result in predictor.map(itertools.takewhile(lambda _: not stop.signal, files)):
                try:
                    results.add(result)
                except ImageError as error:
                    failures.add("skipped", str(result.item), str(error))
                progress.advance()
    finally:
        results.finish()  # also after an error
    return time.perf_counter() - started


def _run_videos(
    predictor: Predictor,
    videos: list[str],
    results: Results,
    failures: Failures,
    options: VideoOptions,
    stop: Interruption,
) -> list[dict[str, Any]]:
    """Runs the videos until `stop`; returns their reports."""
    from comask.runtime.video.container import file_name, shown_name

    reports = []
    for address in videos if not stop.signal else ():
        shown, name = shown_name(address), results.unique(file_name(address))
        try:
            report, problems = run_video(predictor, address, name, options, stop)
        except VideoError as error:
            if stop.signal:
                break
            failures.add("skipped", shown, str(error))
            continue
        interrupted = bool(stop.signal)
        reports.append({"file": shown, **report, "interrupted": interrupted})
        for problem in problems:
            failures.add("incomplete", shown, problem)
        if stop.signal:
            break
    return reports


def _video_line(report: dict[str, Any]) -> str:
    line = (
        f"{one_line(report['file'])}: {'interrupted after ' if report['interrupted'] else ''}"
        f"{report['frames']} frames in {report['seconds']:.1f} s "
        f"({report['frames'] / report['seconds']:.1f} frames/s), {report['detections']} detections"
    )
    if report["left_out"]:
        line += f", the overlay is without {', '.join(report['left_out'])}"
    for count in ("dropped", "damaged", "reconnects"):
        if report[count]:
            line += f", {report[count]} {count}"
    if report["detour"]:
        line += f", frames were copied to the GPU: {one_line(report['detour'])}"
    return line


def _kinds(save: str) -> set[str]:
    kinds = {kind.strip() for kind in save.split(",") if kind.strip()}
    if unknown := kinds - set(KINDS):
        raise click.UsageError(
            f"--save {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}"
        )
    return kinds


class Results:
    """Writes the results of images that `--save` asks for.

    Args:
        folder: the folder of the results, created if it does not exist.
        kinds: names from `KINDS`.
        threshold: the lowest score that is drawn.

    Raises:
        ComaskError: when nothing can be written there, as on a full disk, or the folder holds a job.
    """

    def __init__(self, folder: Path, kinds: set[str], threshold: float) -> None:
        self._folder, self._kinds, self._threshold = folder, kinds, threshold
        self._coco: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._taken: set[str] = set()
        self.detections = 0
        if folder.is_file():
            raise ComaskError(f"--output {folder}: is a file; --output is a folder")
        if (folder / MANIFEST).exists():
            raise ComaskError(f"--output {folder}: holds a bundle; give another folder")
        if (folder / "job.json").exists():
            raise ComaskError(f"--output {folder}: holds a job; give another folder")
        for name in ("detections.json", "images.json"):  # before an hour's work, not after
            if (folder / name).is_dir():
                raise ComaskError(f"--output {folder}: {name} in it is a folder; remove it")
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, result: ImageResult[Path]) -> None:
        """Writes the results of one image.

        Raises:
            ImageError: when the image has no results, or they cannot be written.
        """
        from comask.draw import draw_overlay

        path, pixels, found = result.item, result.pixels, result.detections
        assert pixels is not None
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
        # last, so that an interruption never leaves an image in only one of the two files
        self._coco += entries
        self._images.append(
            {"id": image_id, "file_name": str(path), "width": width, "height": height}
        )
        self.detections += len(found)

    @property
    def images(self) -> int:
        """The number of images with results."""
        return len(self._images)

    def finish(self) -> None:
        """Writes the files that cover all images."""
        if "coco" in self._kinds:
            with self._writing(self._folder):
                for file, content in (("detections", self._coco), ("images", self._images)):
                    write_whole(self._folder / f"{file}.json", json.dumps(content).encode())

    def unique(self, name: str) -> str:
        """Returns `name`, or a numbered name if a file of another folder has it already."""
        unique, number = name, 2
        while unique in self._taken:
            unique, number = f"{name}.{number}", number + 1
        self._taken.add(unique)
        return unique

    def _write_png(self, name: str, pixels: NDArray[Any]) -> None:
        from PIL import Image

        # not durable: waiting for the disk takes as long as a GPU needs for the image
        with whole_file(self._folder / name, durable=False) as file:
            Image.fromarray(pixels).save(file, format="PNG")

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
