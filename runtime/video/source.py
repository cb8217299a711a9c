"""Reads frames with their times from a file, a camera or a stream with PyAV."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from comask.errors import VideoError
from comask.preprocess import Pixels
from comask.runtime.backends.base import Closing
from comask.runtime.video.container import (
    MICROSECONDS,
    TIMEOUT_SECONDS,
    Completeness,
    Orientation,
    audio_stream,
    frame_orientation,
    is_address,
    is_camera,
    left_out,
    open_container,
    reason,
    shown_name,
    video_errors,
    video_stream,
)
from comask.runtime.video.hardware import Nv12Picture, Where, gpu_decoder, nv12_problem
from comask.runtime.video.times import FrameTimes

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext

Oriented: TypeAlias = "tuple[VideoFrame, Orientation]"

LONGEST_WAIT = 30.0  # seconds between two attempts to reconnect

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """One decoded picture.

    Attributes:
        index: the frame's number in the video from 0, counted over all frames of the decoder.
        pts: the time stamp that `time` is based on, in the stream's time base; None without a time stamp.
        time: seconds since the start of the video, or since a live source's first frame; exact, and
            greater with every frame.
        picture: `pixels` on the host, or the frame on the GPU that decoded it.
    """

    index: int
    pts: int | None
    time: Fraction
    picture: Pixels | Nv12Picture

    @property
    def pixels(self) -> Pixels:
        """u8 [h, w, 3], RGB, turned upright as the video states.

        The first access copies a frame on a GPU to the host.
        """
        return self.picture if isinstance(self.picture, np.ndarray) else self.picture.pixels

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of `pixels`, without a copy to the host."""
        if isinstance(self.picture, np.ndarray):
            return self.picture.shape[0], self.picture.shape[1]
        return self.picture.size


@dataclass(frozen=True, slots=True)
class Color:
    """The meaning of a video's YUV: code points of ITU-T H.273; 2 means unspecified."""

    space: int
    primaries: int
    transfer: int

    @classmethod
    def of(cls, codec: VideoCodecContext) -> Color:
        """Returns the color that `codec` states."""
        return cls(int(codec.colorspace), int(codec.color_primaries), int(codec.color_trc))


class VideoSource(Closing):
    """An open file, camera or stream. Iterate over it once to read its frames.

    Damaged packets and frames are skipped and counted. A live source (a camera, or a stream without a
    stated duration) that is lost is opened again, after waits that double from one to thirty seconds.
    One thread may iterate; any thread may call `stop`.

    Args:
        address: path of a file, `camera:0`, `/dev/video0`, or rtsp://, http(s)://, udp:// and the like.
        every: yield only every n-th frame.
        audio: whether to collect the packets of the best decodable audio track in `audio_packets`;
            otherwise they are discarded.
        patience: seconds without a frame after which a lost live source is given up.
        decode: `gpu` decodes on the GPU, and fails if the network cannot read a frame there; `auto`
            decodes on the GPU if possible, and copies such frames to the host; `cpu` decodes on the CPU.
        gpu: index of the GPU whose memory the predictor reads: its `stages.gpu`.

    Attributes:
        name: the address without user and password.
        size: (h, w) as the stream states it, before frames are turned upright.
        live: whether frames arrive at their own pace.
        time_base: seconds per unit of `SourceFrame.pts`; `SourceFrame.time` is a multiple of it.
        rate: the stated frames per second; 25 if the stream states no rate.
        frames: the number of frames that the file states; None if unknown.
        aspect: width of a pixel by its height, upright from the first frame on.
        color: the meaning of the YUV values.
        audio_stream: the track whose packets are collected.
        audio_packets: packets as (packet, seconds to add to its times), oldest first.
        left_out: descriptions of the tracks that are discarded; empty without `audio`.
        decoded_on: `gpu` or `cpu`, where the last frame was decoded.
        detour: why frames were in the host's memory on their way to the predictor's GPU; None if they
            were not, the predictor reads the host's memory, or `decode` is `cpu`.
        damaged: the number of packets and frames that could not be decoded completely.
        reconnects: the number of times that a lost source was connected again.
        problem: why the frames ended before the video did, or None.

    Raises:
        VideoError: the source cannot be opened or holds no video. While iterating: a frame cannot stay
            on the GPU, and `decode` is `gpu`.
        BackendUnavailableError: PyAV is not installed, or no GPU can decode.
    """

    def __init__(
        self,
        address: str | Path,
        *,
        every: int = 1,
        audio: bool = False,
        patience: float = 300.0,
        decode: Where = "auto",
        gpu: int | None = None,
    ) -> None:
        self._address, self._every, self._patience = str(address), every, patience
        self.name = shown_name(self._address)
        self._decode = decode
        self._codecs, problem = gpu_decoder(decode, gpu)
        self.detour = None if gpu is None else problem
        self.decoded_on: Literal["cpu", "gpu"] = "cpu"
        self._container = open_container(self._address, self._codecs)
        with video_errors(self.name, "cannot be opened"):
            video = video_stream(self._container)
            if video is None:
                self._container.close()
                raise VideoError(f"{self.name}: holds no video that can be decoded")
            self._video = video
            self.size = (video.height, video.width)
            self.rate = Fraction(video.average_rate or video.guessed_rate or 25)
            self.aspect = self._aspect = video.sample_aspect_ratio or Fraction(1)
            self.color = Color.of(video.codec_context)
            stated = self._container.duration
            self.live = is_camera(self._address) or (is_address(self._address) and stated is None)
            self.frames: int | None = None
            if not self.live:
                self.frames = (
                    video.frames or round((stated or 0) / MICROSECONDS * self.rate) or None
                )
            self.audio_stream = audio_stream(self._container) if audio else None
            self._audio_parameters = self.audio_stream and _audio_parameters(self.audio_stream)
            self.left_out = left_out(self._container, video, self.audio_stream) if audio else []
            self._times = FrameTimes(self._container, video, self.rate, live=self.live)
            self._completeness = Completeness(self._container, video, self.rate)
        self.time_base = self._times.unit
        self.audio_packets: deque[tuple[Packet[AudioStream], Fraction]] = deque()
        self.damaged = self.reconnects = 0
        self.problem: str | None = None
        self._broken: str | None = None  # the demuxer's error at the connection's end
        self._stopped = threading.Event()
        self._index = 0
        self._wait = 1.0

    def __iter__(self) -> Iterator[SourceFrame]:
        while True:
            for index, stamp, moment, decoded in self._decoded():
                if index % self._every == 0:
                    with video_errors(self.name, "a frame cannot be converted"):
                        picture = self._picture(*decoded)
                    yield SourceFrame(index, stamp, moment, picture)
            if self._stopped.is_set() or not self.live or not self._reconnected():
                return

    def drop_audio(self, words: str) -> None:
        """Stops collecting audio; `words` are appended to `left_out`."""
        self.left_out.append(words)
        self.audio_stream = None

    def stop(self) -> None:
        """Ends the iteration at the next packet, or within ten seconds if a stream has stalled."""
        self._stopped.set()

    def close(self) -> None:
        """Closes the source. No other thread may be iterating."""
        self._container.close()

    def _decoded(self) -> Iterator[tuple[int, int | None, Fraction, Oriented]]:
        """Yields (number, time stamp, time, picture) of undamaged frames until the end or `stop`."""
        video = self._video
        # AUTO delays frames, and needs more surfaces than a GPU may have.
        video.thread_type = "SLICE" if self.live or video.codec_context.is_hwaccel else "AUTO"
        for packet in self._packets():
            if self._stopped.is_set():
                return
            if packet is not None:
                self._note_packet(packet)
                if packet.stream_index != video.index:
                    continue
            try:
                frames = video.decode(packet)
            except Exception:  # PyAV raises more than FFmpegError.
                self.damaged += 1
                if packet is not None:
                    self._times.lost(packet)
                continue
            for frame in frames:
                self._index += 1
                self._wait = 1.0
                stamp, moment = self._times.time(frame)
                if frame.is_corrupt:
                    self.damaged += 1
                else:
                    yield self._index - 1, stamp, moment, (frame, self._orientation(frame))
        if not self.live:
            self.problem = self._what_is_missing()

    def _orientation(self, decoded: VideoFrame) -> Orientation:
        try:
            return frame_orientation(decoded)
        except VideoError as error:
            raise VideoError(f"{self.name}: {error}") from error

    def _picture(self, decoded: VideoFrame, orientation: Orientation) -> Pixels | Nv12Picture:
        """Returns the picture of a `SourceFrame`: on the GPU if the network can read it there."""
        self.decoded_on = "gpu" if decoded.format.name == "cuda" else "cpu"
        if self._codecs is not None:
            problem = nv12_problem(decoded, self._video.codec_context, orientation)
            if problem is None:
                return Nv12Picture(decoded)
            if self._decode == "gpu":
                raise VideoError(f"{self.name}: frames cannot stay on the GPU: {problem}")
            if problem != self.detour:
                self.detour = problem
                logger.info("%s: frames are copied to the host: %s", self.name, problem)
        self.aspect = 1 / self._aspect if orientation.transposed else self._aspect
        return orientation.upright(np.asarray(decoded.to_ndarray(format="rgb24"), np.uint8))

    def _packets(self) -> Iterator[Packet[Any] | None]:
        """Yields all packets, then None to flush the decoder."""
        self._broken = None
        try:
            asked = time.monotonic()
            for packet in self._container.demux():
                late = time.monotonic() - asked >= TIMEOUT_SECONDS
                if packet.size:  # `demux` ends with an empty packet for each stream.
                    yield packet
                if late and self.live:
                    break  # FFmpeg flushed its parser after a timeout, and would wait as long again.
                asked = time.monotonic()
        except Exception as error:  # PyAV raises more than FFmpegError.
            self._broken = reason(error)
        yield None

    def _note_packet(self, packet: Packet[Any]) -> None:
        """Collects a packet of audio, and notes times and completeness."""
        self._completeness.packet(packet)
        self._times.packet(packet, video=packet.stream_index == self._video.index)
        audio, shift = self.audio_stream, self._times.shift
        if audio is None or packet.stream_index != audio.index or shift is None:
            return
        if packet.pts is not None and packet.dts is not None:
            self.audio_packets.append((packet, shift))

    def _same_audio(self, container: InputContainer) -> bool:
        """Continues with a new connection's audio if its encoding is unchanged; returns whether it is."""
        audio = audio_stream(container)
        if audio is None or _audio_parameters(audio) != self._audio_parameters:
            return False
        self.audio_stream = audio
        return True

    def _what_is_missing(self) -> str | None:
        """Says why a file's frames ended too early, by its stated length and the demuxer's error."""
        if self._index == 0:
            return f"no frame could be decoded ({self._broken or 'no data'})"
        missing = self._completeness.problem(self._index)
        if missing and self._broken:
            return f"{missing} ({self._broken})"
        return missing or self._broken

    def _reconnected(self) -> bool:
        """Opens a lost source again, waiting longer each time; returns False after `patience`."""
        self._container.close()
        while time.monotonic() - self._times.last_seen < self._patience:
            if self._stopped.wait(self._wait):
                return False
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            try:
                self._container = open_container(self._address, self._codecs)
                video = video_stream(self._container)
                if video is None:
                    raise VideoError(f"{self.name}: holds no video that can be decoded")
            except VideoError as error:
                away = time.monotonic() - self._times.last_seen
                self.problem = f"lost, and not found again for {away:.0f} s: {error}"
                continue
            self._video = video
            self._times.reconnected(video)
            if self.audio_stream is not None and not self._same_audio(self._container):
                # An overlay's audio track was set up for the first encoding.
                self.drop_audio("the audio track since it changed")
            self.problem = None
            self.reconnects += 1
            return True
        self.problem = self.problem or f"gave no frame for {self._patience:.0f} s"
        return False


def _audio_parameters(stream: AudioStream) -> tuple[Any, ...]:
    """Returns the parameters that must be equal for packets of two connections to share a track."""
    codec = stream.codec_context
    return codec.name, codec.sample_rate, codec.layout.name, codec.extradata, stream.time_base
