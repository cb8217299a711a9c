"""`comask-infer`: a bundle over images, folders, videos, cameras and streams."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from comask.cli.infer_fleet import FleetOptions, fleet_options, run_fleet
from comask.cli.infer_video import WHERE, VideoOptions, run_video, split_inputs
from comask.cli.options import Interruption, command, json_option, write_json
from comask.cli.predictor_options import predictor_options
from comask.errors import ComaskError, ImageError, VideoError, one_line
from comask.files import is_folder_fault, whole_file, write_whole
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from comask.runtime.images import ImageResult
    from comask.runtime.video import Where
    from comask.structures import Detections

KINDS = ("overlay", "masks", "coco", "labels")


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option("--output", required=True, metavar="PATH", help="Folder of results.")
@click.option("--backend", default="auto", metavar="NAME",
              help="tensorrt, tensorrt-rtx, onnxruntime, torch; :fp16 behind it. [auto]")  # fmt: skip
@click.option("--save", default="overlay,coco", metavar="KINDS",
              help=f"Any of {','.join(KINDS)}. [overlay,coco]")  # fmt: skip
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.5, metavar="P",
              help="Lowest score drawn in overlays. [0.5]")  # fmt: skip
@predictor_options(batch=8)
@click.option("--every", type=click.IntRange(1), default=1, metavar="N",
              help="Videos: look at each N-th frame alone.")  # fmt: skip
@click.option("--track", is_flag=True, help="Videos: instances keep an id and a colour.")
@click.option("--decode", type=click.Choice(WHERE), default="auto",
              help="Videos: gpu for tensorrt backends. [auto]")  # fmt: skip
@click.option("--encode", type=click.Choice(WHERE), default="auto",
              help="Videos: overlays by x264 or NVENC. [auto]")  # fmt: skip
@fleet_options
@json_option
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
    fleet: FleetOptions | None,
    json_file: str | None,
) -> None:
    """Run BUNDLE over images, videos, folders and patterns of them, camera:0, or rtsp://… and the like.

    Results keep the name and extension of their source: photo.jpg.overlay.png, photo.jpg.mask.png
    (u16, pixel = instance number from 1, best score on top), photo.jpg.labels.txt (class, score, x1,
    y1, x2, y2 with tabs between), and detections.json (COCO results) with images.json (its image ids)
    for all images; videos give clip.mp4.overlay.mp4, and clip.mp4.jsonl with a line a frame. Results of
    the same names are replaced. Inputs that cannot be read are skipped; the exit code is then 1.

    \b
    comask-infer bundle photos 'more/**/*.jpg' clip.mp4 --output results
    """
    if fleet:
        run_fleet(bundle, inputs, output, backend, how, fleet, json_file)
        return
    if "://" in output:
        raise click.UsageError(f"--output {output}: addresses go with --runner")
    folder = Path(output)
    kinds = _kinds(save)
    images, videos = split_inputs(inputs)
    gpu = None if how.device == "cpu" else how.device or 0
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
            whole = not stop.signal  # which one later does not change
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
        failures.tell()  # also of what was done before an error
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
        """Notes one input; `error` is made to name the file where it does not."""
        text = one_line(error if error.startswith(file) else f"{file}: {error}")
        self.entries.append({"file": file, "error": text})
        self._lines.append(f"{kind}: {text}")

    def tell(self) -> None:
        """Prints a line each, behind everything else, where they are seen."""
        for line in self._lines:
            click.echo(line, err=True)


def _run_images(
    predictor: Predictor,
    files: list[Path],
    results: Results,
    failures: Failures,
    stop: Interruption,
) -> float:
    """Runs the images until `stop`; the seconds it took."""
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
        results.finish()  # also of what was done before an error
    return time.perf_counter() - started


def _run_videos(
    predictor: Predictor,
    videos: list[str],
    results: Results,
    failures: Failures,
    options: VideoOptions,
    stop: Interruption,
) -> list[dict[str, Any]]:
    """Runs the videos until `stop`; their reports."""
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
        reports.append({"file": shown, **dataclasses.asdict(report), "interrupted": interrupted})
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
    return line


def _kinds(save: str) -> set[str]:
    kinds = {kind.strip() for kind in save.split(",") if kind.strip()}
    if unknown := kinds - set(KINDS):
        raise click.UsageError(
            f"--save {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}"
        )
    return kinds


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

    def add(self, result: ImageResult[Path]) -> None:
        """The results of one image.

        Raises:
            ImageError: when there are none, or they cannot be written, as under too long a name.
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
