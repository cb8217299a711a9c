"""Frames with their times, from a file, a camera or a stream, by PyAV."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from comask.runtime.session import Closing
from comask.runtime.video.address import (
    is_address,
    is_camera,
    open_container,
    reason,
    shown_name,
    video_stream,
)
from comask.runtime.video.hardware import Nv12Picture, Where, gpu_decoder, nv12_problem

from comask.errors import VideoError
from comask.preprocess import Pixels

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.audio.stream import AudioStream
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

LONGEST_WAIT = 30.0  # seconds between two attempts to connect again
CLOCK_SECONDS = 60.0  # by which a live source's time stamps may differ from our clock
MICROSECONDS = 1_000_000  # in a second; FFmpeg's unit of durations
MISSING_SECONDS = 1.0  # by which a file's data may end before the end it states

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """One decoded picture.

    Attributes:
        index: its number in the video from 0, counted over all that the decoder gave.
        pts: its time stamp as it was decoded, in the stream's time base; None where it has none.
        time: seconds since the start of the video, or of a live source's first frame; exact, and greater
            with every frame.
        picture: `pixels` on the host, or the frame where a GPU decoded it.
    """

    index: int
    pts: int | None
    time: Fraction
    picture: Pixels | Nv12Picture

    @property
    def pixels(self) -> Pixels:
        """u8 [h, w, 3], RGB, turned upright as the video's rotation says.

        A frame on a GPU is brought to the host when they are first asked for.
        """
        return self.picture if isinstance(self.picture, np.ndarray) else self.picture.pixels

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of `pixels`, without asking for them."""
        if isinstance(self.picture, np.ndarray):
            return self.picture.shape[0], self.picture.shape[1]
        return self.picture.size


@dataclass(frozen=True, slots=True)
class Color:
    """How a video's YUV is meant: numbers of ITU-T H.273, 2 where it is not said."""

    space: int
    primaries: int
    transfer: int

    @classmethod
    def of(cls, codec: VideoCodecContext) -> Color:
        """What `codec` states."""
        return cls(int(codec.colorspace), int(codec.color_primaries), int(codec.color_trc))


class VideoSource(Closing):
    """A file, camera or stream, opened; iterate over it once for its frames.

    Damaged packets and frames are left out and counted. A live source (a camera, or a stream without a
    stated duration) that is lost is opened again, after waits that double from one to thirty seconds.
    One thread iterates; `stop` may be called from any.

    Args:
        address: path of a file, `camera:0`, `/dev/video0`, or rtsp://, http(s)://, udp:// and the like.
        every: give each n-th frame alone.
        audio: collect the packets of the best audio stream in `audio_packets`; otherwise they are
            discarded.
        patience: seconds without a frame after which a lost live source is given up.
        decode: `gpu` decodes on the GPU and fails where a frame cannot be left there for the network;
            `auto` decodes there if there is one, and brings such frames to the host; `cpu` does not.
        gpu: index of the GPU whose memory the predictor reads: its `stages.gpu`.

    Attributes:
        name: the address without user and password.
        size: (h, w) as the stream states it, before it is turned.
        live: whether frames come at their own pace.
        time_base: seconds a unit of `SourceFrame.pts`, of which `SourceFrame.time` is a multiple.
        rate: frames a second as stated, 25 where nothing is.
        frames: how many there are by what the file states, None where unknown.
        aspect: width of a pixel by its height, upright from the first frame on.
        color: how YUV is meant.
        audio_stream: the stream whose packets are collected.
        audio_packets: packets as (packet, seconds to add to its times), oldest first.
        damaged: packets and frames that could not be decoded whole.
        reconnects: how often a lost source was found again.
        problem: why the frames ended before the video did, or None.

    Raises:
        VideoError: when it cannot be opened or holds no video, or, while iterating, a frame cannot stay
            on the GPU and `decode` is `gpu`.
        BackendUnavailableError: when PyAV is not installed, or there is no GPU to decode on.
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
        self._decode, self._hwaccel = decode, gpu_decoder(decode, gpu)
        self._kept_off_gpu: str | None = None  # the last reason why
        self._container = open_container(self._address, self._hwaccel)
        stream = self._stream()
        self.size = (stream.height, stream.width)
        self.time_base = stream.time_base or Fraction(1, 90_000)
        self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.aspect = self._aspect = stream.sample_aspect_ratio or Fraction(1)
        self.color = Color.of(stream.codec_context)
        stated = self._container.duration
        self.live = is_camera(self._address) or (is_address(self._address) and stated is None)
        self.frames = None
        if not self.live:
            self.frames = stream.frames or round((stated or 0) / MICROSECONDS * self.rate) or None
        audio_streams = self._container.streams.audio if audio else ()
        self.audio_stream: AudioStream | None = audio_streams[0] if audio_streams else None
        self.audio_packets: deque[tuple[Packet[AudioStream], Fraction]] = deque()
        self.damaged = self.reconnects = 0
        self.problem: str | None = None
        self._broken: str | None = None  # what the demuxer said of the connection's end
        self._stopped = threading.Event()
        self._index = 0
        self._last_time = -self.time_base
        self._data_end = Fraction(0)
        self._first_seen: float | None = None
        self._last_seen = time.monotonic()
        self._wait = 1.0
        # seconds from the stream's times to ours; None until a live source's next frame tells
        self._shift: Fraction | None = None
        if not self.live:
            start = Fraction(max(self._container.start_time or 0, 0), MICROSECONDS)
            self._shift = -round(start / self.time_base) * self.time_base

    def __iter__(self) -> Iterator[SourceFrame]:
        while True:
            for index, decoded in self._decoded():
                moment = self._time(decoded)
                if index % self._every == 0:
                    yield SourceFrame(index, decoded.pts, moment, self._picture(decoded))
            if self._stopped.is_set() or not self.live or not self._reconnected():
                return

    def stop(self) -> None:
        """Ends the iteration at the next packet, within ten seconds where a stream has stalled."""
        self._stopped.set()

    def close(self) -> None:
        """Closes the source; not while another thread iterates."""
        self._container.close()

    def _stream(self) -> VideoStream:
        stream = video_stream(self._container)
        assert stream is not None  # open_container saw to it
        return stream

    def _decoded(self) -> Iterator[tuple[int, VideoFrame]]:
        """Whole frames of this connection with their numbers, until its end or `stop`."""
        import av

        video = self._stream()
        # AUTO holds frames back, and takes a GPU more surfaces than it may have.
        video.thread_type = "SLICE" if self.live or video.codec_context.is_hwaccel else "AUTO"
        for packet in self._packets():
            if self._stopped.is_set():
                return
            if packet is not None:
                self._note_packet(packet)
                if packet.stream is not video:
                    continue
            try:
                frames = video.decode(packet)
            except av.FFmpegError:
                self.damaged += 1
                continue
            for frame in frames:
                self._index += 1
                if frame.is_corrupt:
                    self.damaged += 1
                else:
                    yield self._index - 1, frame
        if not self.live:
            self.problem = self._what_is_missing()

    def _picture(self, decoded: VideoFrame) -> Pixels | Nv12Picture:
        """What a `SourceFrame` holds, left on the GPU where the network can read it there."""
        if self._hwaccel is not None:
            problem = nv12_problem(decoded, self._stream().codec_context)
            if problem is None:
                return Nv12Picture(decoded)
            if self._decode == "gpu":
                raise VideoError(f"{self.name}: frames cannot stay on the GPU: {problem}")
            if problem != self._kept_off_gpu:
                self._kept_off_gpu = problem
                logger.info("%s: frames by way of the host: %s", self.name, problem)
        quarters = round(decoded.rotation / 90)
        self.aspect = 1 / self._aspect if quarters % 2 else self._aspect
        upright = np.rot90(decoded.to_ndarray(format="rgb24"), quarters)
        return np.ascontiguousarray(upright, dtype=np.uint8)

    def _packets(self) -> Iterator[Packet[Any] | None]:
        """All packets; None after the last one asks the decoder for what it holds back."""
        import av

        self._broken = None
        try:
            for packet in self._container.demux():
                if packet.size:  # demux ends with an empty one for each stream
                    yield packet
        except av.FFmpegError as error:
            self._broken = reason(error)
        yield None

    def _note_packet(self, packet: Packet[Any]) -> None:
        """Keeps audio, and the place up to which there is data."""
        if packet.pts is None or packet.time_base is None:
            return
        end = (packet.pts + (packet.duration or 0)) * packet.time_base
        self._data_end = max(self._data_end, end)
        if self.audio_stream is None or self._shift is None or packet.dts is None:
            return
        if packet.stream is self._container.streams.audio[0]:
            self.audio_packets.append((packet, self._shift))

    def _what_is_missing(self) -> str | None:
        """Why a file's frames ended too early, judged by the duration it states."""
        if self._index == 0:
            return f"no frame could be decoded ({self._broken or 'no data'})"
        stated = self._container.duration
        if stated is not None:
            end = Fraction(stated + (self._container.start_time or 0), MICROSECONDS)
            if self._data_end < end - MISSING_SECONDS:
                return (
                    f"its data ends at {float(self._data_end):.1f} s of {float(end):.1f} s: "
                    f"{self._broken or 'truncated'}"
                )
        return self._broken

    def _time(self, frame: VideoFrame) -> Fraction:
        """The frame's `SourceFrame.time`."""
        self._last_seen, self._wait = time.monotonic(), 1.0
        if self._first_seen is None:
            self._first_seen = self._last_seen
        elapsed = Fraction(self._last_seen - self._first_seen)
        unit = self._stream().time_base  # frames that a decoder held back to the end have none
        if frame.pts is None or unit is None:
            moment = elapsed if self.live else self._last_time + 1 / self.rate
        else:
            stamp = frame.pts * unit
            # After a connection, and after a camera's clock was set, only our own clock knows.
            if self._shift is None or (
                self.live and abs(stamp + self._shift - elapsed) > CLOCK_SECONDS
            ):
                self._shift = elapsed - stamp
            moment = stamp + self._shift
        moment = round(moment / self.time_base) * self.time_base
        self._last_time = max(moment, self._last_time + self.time_base)
        return self._last_time

    def _reconnected(self) -> bool:
        """Opens a lost source again, waiting longer each time; False when that is given up."""
        self._container.close()
        while time.monotonic() - self._last_seen < self._patience:
            if self._stopped.wait(self._wait):
                return False
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            try:
                self._container = open_container(self._address, self._hwaccel)
            except VideoError as error:
                self.problem = f"lost, and not found again for {self._patience:.0f} s: {error}"
                continue
            self._shift, self.problem = None, None
            self.reconnects += 1
            return True
        self.problem = self.problem or f"gave no frame for {self._patience:.0f} s"
        return False
