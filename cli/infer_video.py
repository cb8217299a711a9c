"""What `comask infer` does with videos, cameras and streams."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from comask.cli.options import Interruption, find_files
from comask.errors import ComaskError, EngineError, ImageError, VideoError, one_line
from comask.progress import LINE_SECONDS, Progress

if TYPE_CHECKING:
    from comask.runtime import Predictor
    from comask.runtime.video import (
        Sink,
        SourceFrame,
        Tracker,
        VideoPipeline,
        VideoSource,
        Where,
    )
    from comask.structures import Detections

VIDEO_KINDS = {"overlay", "coco"}
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
        threshold: the lowest score that is drawn, and that starts a track.
        batch: the number of frames of a file that run together.
        every: every n-th frame is run.
        track: whether instances get ids.
        decode: where to decode, see `VideoSource`.
        encode: where to encode, see `OverlayWriter`.
        gpu: the index of the GPU that encodes; None for the processor.
    """

    folder: Path
    kinds: set[str]
    threshold: float
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

            Tracker(self.threshold)


def run_video(
    predictor: Predictor, address: str, name: str, options: VideoOptions, stop: Interruption
) -> tuple[dict[str, Any], list[str]]:
    """Runs one video and writes `name`.overlay.mp4 and `name`.jsonl as asked for.

    Returns:
        The `VideoReport` as a dictionary with `encoder`, which is None without an overlay; and what went
        wrong with the video.

    Raises:
        VideoError: when it cannot be opened, or no frame of it can be run.
        ComaskError: when results cannot be written, or the backend fails.
    """
    from comask.runtime.video import OverlayWriter, VideoPipeline, VideoSource

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
    encoder: str | None = None
    try:
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(contextlib.ExitStack())
            opened.enter_context(source)
            sinks, tracker = _open_sinks(source, name, options, stack)
            encoder = next(
                (sink.encoder for sink in sinks if isinstance(sink, OverlayWriter)), None
            )
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
    return dataclasses.asdict(report) | {"encoder": encoder}, problems


def _open_sinks(
    source: VideoSource, name: str, options: VideoOptions, stack: contextlib.ExitStack
) -> tuple[list[Sink], Tracker | None]:
    """Opens the sinks of a video's results; `stack` closes them."""
    from comask.runtime.video import JsonLines, OverlayWriter, Tracker

    sinks: list[Sink] = []
    if "overlay" in options.kinds:
        overlay = OverlayWriter(
            options.folder / f"{name}.overlay",
            source,
            options.threshold,
            encode=options.encode,
            gpu=options.gpu,
        )
        sinks.append(stack.enter_context(overlay))
    if "coco" in options.kinds:
        sinks.append(stack.enter_context(JsonLines(options.folder / f"{name}.jsonl")))
    sinks.append(stack.enter_context(_Shown(source, options.every)))
    tracker = Tracker(options.threshold, source.rate / options.every) if options.track else None
    return sinks, tracker


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
