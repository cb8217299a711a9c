"""Writes a video's results: as an overlay with the video's audio, and as JSON lines."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comask.draw import draw_overlay
from comask.errors import ComaskError, VideoError
from comask.files import is_folder_fault, part_of
from comask.preprocess import Pixels
from comask.runtime.backends.base import Closing
from comask.runtime.video.container import file_url, import_av, reason
from comask.runtime.video.hardware import Where, choose_encoder
from comask.runtime.video.source import SourceFrame, VideoSource
from comask.structures import Detections

if TYPE_CHECKING:
    from av.audio.stream import AudioStream

# Audio codecs that players support in MP4; Matroska supports all others.
MP4_AUDIO = {"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"}
# H.273's code points of the matrices that swscale has → swscale's numbers.
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
_DEFAULT_MATRIX, _LIMITED_RANGE = 5, 1


class JsonLines(Closing):
    """Writes one line per frame. Each line is complete in the file before the next frame is written.

    A line holds `frame` (number from 0), `pts` (time stamp as decoded, or null), `time` (seconds from
    the start), `width`, `height` and `detections`: COCO results whose `image_id` is the frame's number.
    With a tracker, each result has a `track_id`, which is null until it is assigned.

    Args:
        path: the file's path; an existing file is replaced.

    Raises:
        VideoError: a file of that name cannot exist.
        ComaskError: the file cannot be written, here and in `add`.
    """

    wants_rle = True  # see `Sink`

    def __init__(self, path: Path) -> None:
        self._end, self._writing = 0, _Writing(path)
        with self._writing:
            self._file = path.open("wb", buffering=0)  # Each line is one system call.

    def add(
        self, frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
    ) -> None:
        """Writes one frame's line."""
        line = f"{json.dumps(frame_results(frame, found, track_ids))}\n".encode()
        with self._writing:
            if self._file.write(line) < len(line):  # for example, because the disk is full
                self._file.truncate(self._end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def frame_results(
    frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
) -> dict[str, Any]:
    """Returns the content of a line of `JsonLines`.

    Args:
        frame: the frame.
        found: the frame's detections.
        track_ids: [N] i64, -1 for an instance without an id; None without a tracker.
    """
    height, width = found.image_size
    results = found.to_coco(image_id=frame.index)
    if track_ids is not None:
        for result, track_id in zip(results, track_ids.tolist(), strict=True):
            result["track_id"] = None if track_id < 0 else track_id
    return {
        "frame": frame.index,
        "pts": frame.pts,
        "time": float(frame.time),
        "width": width,
        "height": height,
        "detections": results,
    }


class OverlayWriter(Closing):
    """Writes H.264 in MP4, or in Matroska if MP4 does not support the source's audio.

    Every frame keeps its time, also at a variable rate; audio packets are copied unchanged. Odd sizes
    become even by repeating the last row or column, since players expect 4:2:0. A frame whose size
    differs from the first one's is scaled to fit it, with black borders.

    Args:
        stem: the path to write, to which `.mp4` or `.mkv` is appended.
        source: the source of the frames, before its iteration; if it collects `audio_packets`, they are
            written. Audio that neither container supports is added to its `left_out`.
        threshold: the lowest score that is drawn, of all classes or of each label.
        encode: `gpu` for NVENC, `cpu` for x264, `auto` for NVENC if available.
        gpu: index of the GPU that encodes; None for no GPU.

    Attributes:
        path: the file's path; the file appears there once it is complete.
        encoder: FFmpeg's name of the encoder, `h264_nvenc` or `libx264`.

    Raises:
        BackendUnavailableError: `encode` is `gpu`, and the GPU cannot encode.
        VideoError: this video cannot be written, here and in `add` and `close`.
        ComaskError: no file can be written there (the disk is full, for example), here and in `add` and
            `close`.
    """

    def __init__(
        self,
        stem: Path,
        source: VideoSource,
        threshold: float | Sequence[float] = 0.5,
        *,
        encode: Where = "auto",
        gpu: int | None = 0,
    ) -> None:
        av = import_av()
        encoder = choose_encoder(encode, gpu, source.size)
        self.encoder = encoder.codec
        self._source, self._threshold = source, threshold
        audio = source.audio_stream
        as_mp4 = audio is None or audio.codec_context.name in MP4_AUDIO
        if audio is not None and not _takes("mp4" if as_mp4 else "matroska", audio):
            source.drop_audio(f"1 audio track in {audio.codec_context.name}")
            audio, as_mp4 = None, True
        self.path = stem.with_name(f"{stem.name}.{'mp4' if as_mp4 else 'mkv'}")
        self._part = part_of(self.path)  # No player can read an incomplete file.
        self._writing = _Writing(self.path)
        with self._writing:
            if self.path.is_dir():  # Fail now rather than after the whole video is drawn.
                raise VideoError(f"{self.path}: cannot be written: it is a folder")
            self._output = av.open(
                file_url(self._part), "w", format="mp4" if as_mp4 else "matroska"
            )
            self._video = encoder.add_to(self._output, source.rate)
            self._audio: AudioStream | None = None
            if audio is not None:
                self._audio = self._output.add_stream_from_template(audio)
        self._last_audio: int | None = None
        self._size: tuple[int, int] | None = None  # the first frame's (h, w)
        self._reformatter = av.video.reformatter.VideoReformatter()

    def add(
        self, frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
    ) -> None:
        """Draws and encodes one frame, and copies the audio up to it."""
        av = import_av()
        shown = found.reach(self._threshold)
        drawn = draw_overlay(
            frame.pixels, found[shown], None if track_ids is None else track_ids[shown]
        )
        with self._writing:
            if self._size is None:
                self._start(drawn)
            picture = av.VideoFrame.from_ndarray(self._fitted(drawn), format="rgb24")
            picture = self._reformatter.reformat(
                picture,
                format="yuv420p",
                dst_colorspace=_MATRICES.get(self._source.color.space, _DEFAULT_MATRIX),
                dst_color_range=_LIMITED_RANGE,
            )
            picture.time_base = self._source.time_base
            picture.pts = int(frame.time / self._source.time_base)
            self._copy_audio()
            self._output.mux(self._video.encode(picture))

    def close(self) -> None:
        """Completes the file; writes none without any frame, or after an error in writing."""
        try:
            if self._size is None or self._writing.failed:
                with contextlib.suppress(Exception):  # `add` has raised the error to report.
                    self._output.close()
                return
            with self._writing:
                self._copy_audio()
                self._output.mux(self._video.encode(None))
                self._output.close()
                self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def _start(self, first: Pixels) -> None:
        """Sets up the encoder for the size of the first upright frame."""
        source, codec = self._source, self._video.codec_context
        self._size = first.shape[0], first.shape[1]
        codec.height, codec.width = (side + side % 2 for side in self._size)
        codec.pix_fmt = "yuv420p"
        codec.time_base = source.time_base
        if source.color.space in _MATRICES:
            codec.colorspace = source.color.space
        codec.color_primaries = source.color.primaries
        codec.color_trc = source.color.transfer
        codec.color_range = _LIMITED_RANGE
        codec.sample_aspect_ratio = source.aspect

    def _fitted(self, drawn: Pixels) -> Pixels:
        """Returns `drawn` at the size of the video."""
        import cv2

        assert self._size is not None
        height, width = self._size
        if drawn.shape[:2] != self._size:
            scale = min(height / drawn.shape[0], width / drawn.shape[1])
            small = cv2.resize(drawn, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            drawn = np.zeros((height, width, 3), dtype=np.uint8)
            drawn[: small.shape[0], : small.shape[1]] = small[:height, :width]
        if height % 2 or width % 2:
            drawn = np.pad(drawn, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        return drawn

    def _copy_audio(self) -> None:
        """Writes the audio packets that have been collected so far."""
        packets = self._source.audio_packets
        while self._audio is not None and packets:
            packet, shift = packets.popleft()
            assert packet.pts is not None  # The source keeps only such packets.
            assert packet.dts is not None
            offset = round(shift / packet.time_base)
            packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
            # After a lost connection, times may overlap, which no container allows.
            if self._last_audio is None or packet.dts > self._last_audio:
                self._last_audio = packet.dts
                packet.stream = self._audio
                self._output.mux_one(packet)


def _takes(container: str, audio: AudioStream) -> bool:
    """Returns whether a container supports an audio track, by trial: FFmpeg's lists are incomplete."""
    av = import_av()
    try:
        with av.open(io.BytesIO(), "w", format=container) as trial:
            trial.add_stream_from_template(audio)
            trial.start_encoding()
    except Exception:  # PyAV raises more than FFmpegError.
        return False
    return True


class _Writing:
    """A context manager that turns every exception in its block into one that names the file.

    Attributes:
        failed: whether there was an exception. FFmpeg must then write nothing more: a process that
            writes a header again after the disk was full ends with a segmentation fault.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.failed = path, False

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.failed = self.failed or error is not None
        if isinstance(error, Exception) and not isinstance(error, ComaskError):
            raise (ComaskError if is_folder_fault(error) else VideoError)(
                f"{self._path}: cannot be written: {reason(error)}"
            ) from error
