"""What `comask infer` does with videos, cameras and streams."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from comask.cli.options import Interruption, find_files
from comask.cli.threshold import Threshold, lowest
from comask.errors import ComaskError, EngineError, ImageError, VideoError, one_line
from comask.progress import LINE_SECONDS, Progress

if TYPE_CHECKING:
    from comask.preprocess import Pixels
    from comask.result_page import ResultPage
    from comask.runtime import Predictor
    from comask.runtime.video import (
        OverlayWriter,
        Sink,
        SourceFrame,
        Tracker,
        VideoPipeline,
        VideoSource,
        Where,
    )
    from comask.structures import Detections

VIDEO_KINDS = {"overlay", "coco", "page"}
WHERE = ("auto", "cpu", "gpu")  # as `Where`


def split_inputs(inputs: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """Returns the images that inputs name, and the videos, cameras and streams, each in order.

    Raises:
        ComaskError: when inputs name nothing; the text lists all of these inputs.
    """
    from comask.runtime.video import is_address, is_video
    from comask.runtime.video.container import address_of_file

    images: list[Path] = []
    videos: dict[str, None] = {}
    problems: list[str] = []
    for text in inputs:
        if is_address(text):
            videos[text] = None
            continue
        try:
            if "://" in text and not Path(text).exists():
                raise ComaskError(f"{text}: comask job reads addresses of object storage")
            paths = find_files(text, "image", "video")
        except ComaskError as error:
            problems.append(str(error))
            continue
        for path in paths:
            if is_video(path):
                videos[address_of_file(path)] = None
            else:
                images.append(path)
    if problems:
        raise ComaskError("; ".join(problems))
    if not images and not videos:
        raise ComaskError("the inputs are results of comask itself; rename one to run it")
    return list(dict.fromkeys(images)), list(videos)


@dataclasses.dataclass(frozen=True, slots=True)
class VideoOptions:
    """How videos are run.

    Attributes:
        folder: the folder of the results.
        kinds: the kinds of results, among `VIDEO_KINDS`.
        threshold: the lowest score that is drawn, and of all classes that starts a track.
        batch: the number of frames of a file that run together.
        every: every n-th frame is run.
        track: whether instances get ids.
        decode: where to decode, see `VideoSource`.
        encode: where to encode, see `OverlayWriter`.
        gpu: the index of the GPU that encodes; None for the processor.
    """

    folder: Path
    kinds: set[str]
    threshold: Threshold
    batch: int
    every: int
    track: bool
    decode: Where
    encode: Where
    gpu: int | None

    def check(self, videos: list[str]) -> None:
        """Refuses options that do not fit the inputs, and tracking where it is not installed.

        Raises:
            ComaskError: when an option cannot be honoured.
        """
        if not videos:
            if self.track or self.every > 1 or (self.decode, self.encode) != ("auto", "auto"):
                raise ComaskError(
                    "--track, --every, --decode and --encode are for videos, and no input is one"
                )
            return
        if self.encode != "auto" and "overlay" not in self.kinds:
            raise ComaskError("--encode is for overlays, and --save asks for none")
        if wrong := self.kinds - VIDEO_KINDS:
            raise ComaskError(
                f"--save {','.join(sorted(wrong))} is for images, and {videos[0]} is a video: "
                f"choose from {', '.join(sorted(VIDEO_KINDS))}"
            )
        if self.track:
            from comask.runtime.video import Tracker

            Tracker(lowest(self.threshold))


def run_video(
    predictor: Predictor,
    address: str,
    name: str,
    options: VideoOptions,
    stop: Interruption,
    page: ResultPage | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Runs one video and writes `name`.overlay.mp4 and `name`.jsonl as asked for.

    Args:
        predictor: the predictor that runs it.
        address: a file, camera or stream.
        name: the name of its results.
        options: how it is run.
        stop: ends it after the current frames.
        page: gets the video, if it is asked for.

    Returns:
        The `VideoReport` as a dictionary with `encoder`, which is None without an overlay; and what went
        wrong with the video.

    Raises:
        VideoError: when it cannot be opened, or no frame of it can be run.
        ComaskError: when results cannot be written, or the backend fails.
    """
    from comask.runtime.video import VideoPipeline, VideoSource

    with stop.on_signal():  # PyAV swallows what a signal raises while it opens a stream
        source = VideoSource(
            address,
            every=options.every,
            audio="overlay" in options.kinds,
            decode=options.decode,
            gpu=predictor.stages.gpu,
        )
    if stop.signal:
        source.close()
        raise VideoError(f"{source.name}: interrupted before its first frame")
    problems: list[str] = []
    pipeline: VideoPipeline | None = None
    overlay: OverlayWriter | None = None
    shown = None if page is None else _ForPage(page, source, options)
    try:
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(contextlib.ExitStack())
            opened.enter_context(source)
            if "overlay" in options.kinds:
                overlay = stack.enter_context(_overlay(source, name, options))
            sinks, tracker = _open_sinks(source, name, options, stack)
            sinks += [overlay] if overlay else []
            sinks += [shown] if shown else []
            pipeline = VideoPipeline(predictor, source, sinks, batch=options.batch, tracker=tracker)
            opened.pop_all()  # the pipeline closes the source
            stack.enter_context(stop.on_signal(pipeline.stop))
            try:
                pipeline.run()
            except (EngineError, ImageError) as error:
                predictor.check()  # raises if the backend is the cause
                raise VideoError(f"{source.name}: cannot be run: {one_line(error)}") from error
    except VideoError as error:
        if pipeline is None or not pipeline.frames:
            raise
        problems.append(one_line(error).removeprefix(f"{source.name}: "))
    assert pipeline is not None
    report = pipeline.report()
    if report.problem:
        problems.append(report.problem)
    if report.damaged and not source.live:
        problems.append(f"{report.damaged} damaged frames or packets were skipped")
    if shown:
        shown.finish(overlay.path if overlay and overlay.path.exists() else None)
    encoder = overlay.encoder if overlay else None
    return dataclasses.asdict(report) | {"encoder": encoder}, problems


def _overlay(source: VideoSource, name: str, options: VideoOptions) -> OverlayWriter:
    from comask.runtime.video import OverlayWriter

    path = options.folder / f"{name}.overlay"
    return OverlayWriter(path, source, options.threshold, encode=options.encode, gpu=options.gpu)


def _open_sinks(
    source: VideoSource, name: str, options: VideoOptions, stack: contextlib.ExitStack
) -> tuple[list[Sink], Tracker | None]:
    """Opens the sinks of a video's results besides overlay and page; `stack` closes them."""
    from comask.runtime.video import JsonLines, Tracker

    sinks: list[Sink] = []
    if "coco" in options.kinds:
        sinks.append(stack.enter_context(JsonLines(options.folder / f"{name}.jsonl")))
    sinks.append(stack.enter_context(_Shown(source, options.every)))
    tracker = None
    if options.track:
        tracker = Tracker(lowest(options.threshold), source.rate / options.every)
    return sinks, tracker


class _ForPage:
    """A sink that keeps what the page shows of a video: counts over time, and one frame."""

    def __init__(self, page: ResultPage, source: VideoSource, options: VideoOptions) -> None:
        from comask.timeline import Timeline

        self._page, self._name, self._threshold = page, source.name, options.threshold
        self._timeline = Timeline(options.every / source.rate)
        self._most = -1
        self._best: tuple[Pixels, Detections] | None = None  # the first frame of most instances

    def add(self, frame: SourceFrame, found: Detections, track_ids: Any) -> None:
        """Counts one frame."""
        self._timeline.add(frame.time, found)
        count = int(found.reach(self._threshold).sum())
        if count > self._most:  # so that few frames of a GPU are copied to the host
            self._most, self._best = count, (frame.pixels, found)

    def finish(self, overlay: Path | None) -> None:
        """Puts the video on the page, unless it had no frame."""
        if self._best is not None:
            number = self._page.number()
            entry = self._page.write_video(number, self._name, *self._best, self._timeline, overlay)
            self._page.add(entry)


class _Shown(contextlib.ExitStack):
    """A sink that shows progress: a `Progress` for a file, an occasional line for a live source."""

    def __init__(self, source: VideoSource, every: int) -> None:
        super().__init__()
        self._name, self._every, self._count = one_line(source.name), every, 0
        self._last_line = time.monotonic()
        self._progress: Progress | None = None
        if source.frames:
            total = -(-source.frames // every)
            self._progress = self.enter_context(Progress(self._name, total, unit="frames"))

    def add(self, frame: SourceFrame, found: Detections, track_ids: Any) -> None:
        """Counts one frame."""
        self._count += 1
        if self._progress:
            self._progress.advance()
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            came = frame.index // self._every + 1
            click.echo(f"{self._name}: {self._count} of {came} frames looked at", err=True)
