"""Where results of a video go: an overlay beside its sound, and JSON lines."""

from __future__ import annotations

import errno
import io
import json
import os
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
    from av.video.stream import VideoStream

# Audio that players expect in MP4; Matroska takes any other.
MP4_AUDIO = {"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"}
# Numbers of H.273 that swscale has a matrix for, as swscale numbers them.
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
_DEFAULT_MATRIX, _LIMITED_RANGE = 5, 1


class JsonLines(Closing):
    """Writes each frame as a line, which is whole in the file before the next frame comes.

    A line holds `frame` (number from 0), `pts` (time stamp as decoded, or null), `time` (seconds from
    the start), `width`, `height` and `detections`: COCO results whose `image_id` is the frame's number,
    with a `track_id` (null while there is none) where instances are tracked.

    Args:
        path: of the file, replaced where it exists.

    Raises:
        VideoError: when there can be no file of that name.
        ComaskError: when it cannot be written, here and in `add`.
    """

    wants_rle = True  # see `Sink`

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0
        try:
            self._file = path.open("wb", buffering=0)  # a line is one call to the system
        except OSError as error:
            raise self._unwritable(error) from error

    def add(
        self, frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
    ) -> None:
        """Writes one frame's line."""
        line = f"{json.dumps(frame_results(frame, found, track_ids))}\n".encode()
        try:
            if self._file.write(line) < len(line):  # as on a disk that is full
                self._file.truncate(self._end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._end += len(line)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _unwritable(self, error: OSError) -> ComaskError:
        kind = ComaskError if is_folder_fault(error) else VideoError
        return kind(f"{self._path}: cannot be written: {error.strerror or error}")


def frame_results(
    frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
) -> dict[str, Any]:
    """What a line of `JsonLines` holds.

    Args:
        frame: that was looked at.
        found: in it.
        track_ids: [N] i64, -1 where an instance has none yet; None where nothing is tracked.
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
    """Writes H.264 in MP4, or in Matroska where MP4 does not take the source's audio.

    Every frame keeps its time, whatever the rate; audio packets are copied as they are. Sizes become
    even by repeating the last row or column, since players want 4:2:0. A frame of another size than
    the first one's is scaled into it with black borders.

    Args:
        stem: path to write, to which `.mp4` or `.mkv` is appended.
        source: what the frames come from, not iterated yet; its `audio_packets` are written where it
            collects them. Audio that neither container takes is added to its `left_out`.
        threshold: lowest score that is drawn.
        encode: `gpu` is NVENC, `cpu` x264, `auto` NVENC where it opens.
        gpu: index of the GPU that encodes; None for none.

    Attributes:
        path: what is written, and is there when it is complete.

    Raises:
        BackendUnavailableError: when `encode` is `gpu` and that cannot be had.
        VideoError: when this video cannot be written, here and in `add` and `close`.
        ComaskError: when nothing can be written there, as on a full disk; likewise.
    """

    def __init__(
        self,
        stem: Path,
        source: VideoSource,
        threshold: float = 0.5,
        *,
        encode: Where = "auto",
        gpu: int | None = 0,
    ) -> None:
        av = import_av()
        encoder = choose_encoder(encode, gpu, source.size)
        self._source, self._threshold = source, threshold
        audio = source.audio_stream
        as_mp4 = audio is None or audio.codec_context.name in MP4_AUDIO
        if audio is not None and not _takes("mp4" if as_mp4 else "matroska", audio):
            source.drop_audio(f"1 audio track in {audio.codec_context.name}")
            audio, as_mp4 = None, True
        self.path = stem.with_name(f"{stem.name}.{'mp4' if as_mp4 else 'mkv'}")
        self._part = part_of(self.path)  # a file that was not completed plays nowhere
        self._writing = _Writing(self.path)
        with self._writing:
            if self.path.is_dir():  # known now, and not when the whole video is drawn
                raise VideoError(f"{self.path}: cannot be written: it is a folder")
            self._output = av.open(
                file_url(self._part), "w", format="mp4" if as_mp4 else "matroska"
            )
            self._video: VideoStream = self._output.add_stream(
                encoder.codec, rate=source.rate, options=encoder.options, hwaccel=encoder.hwaccel
            )
            self._audio: AudioStream | None = None
            if audio is not None:
                self._audio = self._output.add_stream_from_template(audio)
        self._last_audio: int | None = None
        self._size: tuple[int, int] | None = None  # of the first frame
        self._reformatter = av.video.reformatter.VideoReformatter()

    def add(
        self, frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
    ) -> None:
        """Draws and encodes one frame, and copies the audio up to it."""
        av = import_av()
        shown = found.scores >= self._threshold
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
        """Completes the file; without a frame there is none."""
        try:
            with self._writing:
                if self._size is not None:
                    self._copy_audio()
                    self._output.mux(self._video.encode(None))
                self._output.close()
                if self._size is not None:
                    self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def _start(self, first: Pixels) -> None:
        """Sets up the encoder, now that the size of upright frames is known."""
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
        """`drawn` at the size of the video."""
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
        """Writes the packets that have come so far."""
        packets = self._source.audio_packets
        while self._audio is not None and packets:
            packet, shift = packets.popleft()
            assert packet.pts is not None  # the source saw to it
            assert packet.dts is not None
            offset = round(shift / packet.time_base)
            packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
            # After a lost connection times may overlap, which no container takes.
            if self._last_audio is None or packet.dts > self._last_audio:
                self._last_audio = packet.dts
                packet.stream = self._audio
                self._output.mux_one(packet)


def _takes(container: str, audio: AudioStream) -> bool:
    """Whether a container takes an audio track, by trial: FFmpeg's lists of codecs are not complete."""
    av = import_av()
    try:
        with av.open(io.BytesIO(), "w", format=container) as trial:
            trial.add_stream_from_template(audio)
            trial.start_encoding()
    except Exception:  # of PyAV, which raises more than FFmpegError
        return False
    return True


class _Writing:
    """Turns whatever goes wrong in its block into a ComaskError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, ComaskError):
            raise (ComaskError if is_folder_fault(error) else VideoError)(
                f"{self._path}: cannot be written: {reason(error)}"
            ) from error
