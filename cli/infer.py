"""`comask infer`: a bundle on images, folders, videos, cameras and streams."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from comask.cli.command import command, option
from comask.cli.infer_images import IMAGE_KINDS, QUALITY, ImageResults, OverlayFiles, OverlayFormat
from comask.cli.infer_video import WHERE, VideoOptions, run_video, split_inputs
from comask.cli.options import (
    Interruption,
    backend_option,
    check_outputs,
    json_option,
    predictor_options,
    write_json,
)
from comask.cli.threshold import ThresholdType, check_threshold, thresholds_of
from comask.errors import VideoError, one_line
from comask.result_page import ResultPage
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.names import gpu_index

if TYPE_CHECKING:
    from comask.runtime.video import Where

VIDEOS = "Videos"  # heading of options
SAVED = ("overlay", "coco")  # kinds that are written unless others are named


@command(moved=dict.fromkeys(("--runner", "--shard", "--format", "--actors"), "comask job"))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@option("--output", required=True, metavar="DIR", help="Folder of the results.")
@option("--save", default=",".join(SAVED), metavar="KINDS",
        help=f"[{','.join(SAVED)}], {','.join(k for k in IMAGE_KINDS if k not in SAVED)}")  # fmt: skip
@option("--threshold", type=ThresholdType(), default=0.5, metavar="P|auto",
        help="Lowest score drawn; auto: each class's own. [0.5]")  # fmt: skip
@option("--overlay-format", type=click.Choice(("auto", "jpeg", "png")), default="auto", metavar="AS",
        help="auto (JPEG for a JPEG, else PNG), jpeg, png. [auto]")  # fmt: skip
@option("--quality", type=click.IntRange(1, 100), metavar="N",
        help=f"Of JPEG overlays, 1 to 100. [{QUALITY}]")  # fmt: skip
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
    threshold: float | Literal["auto"],
    overlay_format: OverlayFormat,
    quality: int | None,
    how: LoadOptions,
    every: int,
    track: bool,
    decode: Where,
    encode: Where,
    json_file: str | None,
) -> None:
    """Run a bundle on images, folders, patterns, videos, camera:0 and rtsp://….

    A folder stands for the files directly in it; 'DIR/**/*.jpg' includes subfolders. Results keep the
    name of their input: photo.jpg.overlay.jpg, clip.mp4.overlay.mp4, clip.mp4.jsonl (a line per frame).
    detections.json has the COCO results of all images, images.json their ids; index.html is the page.
    Inputs that cannot be read are skipped; the exit code is then 1.

    \b
    comask infer bundle photos 'more/**/*.jpg' clip.mp4 --output results
    """
    check_outputs(made=output, json=json_file)
    if "://" in output:
        raise click.UsageError(f"--output {output}: addresses are for comask job")
    folder = Path(output)
    kinds = _kinds(save)
    check_threshold(threshold, kinds, track)
    images, videos = split_inputs(inputs)
    drawn_from = thresholds_of(threshold, bundle)
    gpu = gpu_index(how.device)
    options = VideoOptions(
        folder, kinds, drawn_from, how.max_batch, every, track, decode, encode, gpu
    )
    options.check(videos)
    if videos and (how.tile or how.tta):
        raise click.UsageError("--tile and --tta are for images, and an input is a video")
    overlays = OverlayFiles(overlay_format, quality)
    overlays.check(kinds, images)
    page = ResultPage(folder) if "page" in kinds else None
    results = ImageResults(folder, kinds, drawn_from, overlays, page)
    failures = Failures()
    stop = Interruption()
    seconds, reports = 0.0, list[dict[str, Any]]()
    to_stderr = json_file == "-"
    with contextlib.ExitStack() as last:  # also after an error
        last.callback(failures.tell)
        predictor = last.enter_context(Predictor.open(bundle, backend, how))
        click.echo(f"backend {predictor.stages.backend}", err=True)
        if page:
            facts = {"bundle": bundle.resolve().name, "backend": predictor.stages.backend}
            page.start(predictor.class_names or (), drawn_from, facts)
            last.push(_finishing(page, failures, stop, to_stderr))
        if images:
            seconds = _run_images(predictor, images, results, failures, stop)
        whole = not stop.signal  # a later signal does not change this
        reports = _run_videos(predictor, videos, results, failures, options, stop, page)
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
        _warn_of(results, whole=whole)
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


def _finishing(
    page: ResultPage, failures: Failures, stop: Interruption, to_stderr: bool
) -> Callable[..., None]:
    """Makes the end of a block in which results come, which writes the page of those that came."""

    def finish(kind: type[BaseException] | None, *_: object) -> None:
        index = page.finish(failures.entries, whole=kind is None and not stop.signal)
        click.echo(f"page: {one_line(index)}", err=to_stderr)

    return finish


def _run_images(
    predictor: Predictor,
    files: list[Path],
    results: ImageResults,
    failures: Failures,
    stop: Interruption,
) -> float:
    """Runs the images until `stop`; returns the seconds it took."""
    from comask.progress import Progress

    started = time.perf_counter()
    try:
        with stop.on_signal(), Progress("inferring", len(files), unit="images") as progress:
            found = predictor.map(itertools.takewhile(lambda _: not stop.signal, files))
            for path, error in results.write(found):
                if error:
                    failures.add("skipped", str(path), str(error))
                progress.advance()
    finally:
        results.finish()  # also after an error
    return time.perf_counter() - started


def _run_videos(
    predictor: Predictor,
    videos: list[str],
    results: ImageResults,
    failures: Failures,
    options: VideoOptions,
    stop: Interruption,
    page: ResultPage | None,
) -> list[dict[str, Any]]:
    """Runs the videos until `stop`; returns their reports."""
    from comask.runtime.video.container import file_name, shown_name

    reports = []
    for address in videos if not stop.signal else ():
        shown, name = shown_name(address), results.unique(file_name(address))
        try:
            report, problems = run_video(predictor, address, name, options, stop, page)
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


def _warn_of(results: ImageResults, *, whole: bool) -> None:
    """Says what the images' results lack."""
    if results.left_out:
        click.echo(
            f"left out for other tools: {results.left_out} detections whose mask has no pixel",
            err=True,
        )
    if whole and results.images and not results.detections:
        click.echo(
            "nothing was found: train longer, or export again with a lower --score-threshold",
            err=True,
        )


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
    if unknown := kinds - set(IMAGE_KINDS):
        raise click.UsageError(
            f"--save {', '.join(sorted(unknown))}: choose from {', '.join(IMAGE_KINDS)}"
        )
    return kinds
