"""Computes the time of each frame of a video: seconds from its start, in presentation order."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

MICROSECONDS = 1_000_000  # per second; FFmpeg states durations in microseconds
CLOCK_SECONDS = 60.0  # largest difference of a live source's time stamps from our clock
JOINT_SECONDS = 1.0  # time stamps that step back by more begin a new part of the video
LONGEST_REORDER = 64  # packets; no decoder delays more frames than this, including its threads
# Containers that store packets in decoding order, without presentation times. FFmpeg guesses some.
WITHOUT_PRESENTATION_TIMES = {"avi"}


class FrameTimes:
    """Computes when each frame is shown.

    Call `packet` for every packet of the container before it is decoded, and `time` for every video frame
    afterwards. A decoder returns frames in presentation order, so each frame's time is greater than the
    previous one's. If the container's time stamps contradict this:

    - The stamps of a container without presentation times (AVI), or with stamps out of order, are sorted:
      the n-th frame gets the n-th smallest stamp.
    - Stamps that step back by more than a second begin a new part, as in files that were joined end to
      end. The new part follows the previous one without a gap.
    - A frame without a stamp comes one frame period after its predecessor, and so does the first frame
      with a stamp after frames without one.

    A live source's times follow our clock: its first frame is at 0, and after a lost connection or a
    change of a camera's clock, our clock tells how much time has passed.

    Args:
        container: the opened source.
        stream: its video stream.
        rate: the stated frames per second.
        live: whether the source is a camera or an endless stream.

    Attributes:
        unit: seconds per unit of a time stamp; `time` returns multiples of it.
        shift: seconds to add to the container's time stamps; None until a live source's next frame.
        last_seen: the time of the last frame's arrival, by `time.monotonic`.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, rate: Fraction, *, live: bool
    ) -> None:
        self.unit = self._stamp_unit = stream.time_base or Fraction(1, 90_000)
        self._rate, self._live = rate, live
        self.shift: Fraction | None = None
        if not live:
            start = Fraction(max(container.start_time or 0, 0), MICROSECONDS)
            self.shift = -round(start / self.unit) * self.unit
        self._by_dts = container.format.name in WITHOUT_PRESENTATION_TIMES
        self._sorted = self._by_dts
        self._stamps: list[int] = []  # heap: stamps of packets whose frames have not come yet
        self._last_stamp: int | None = None
        self._unstamped = False  # whether frames without a stamp preceded the first stamp
        self._last_time = -self.unit
        self._first_seen: float | None = None
        self.last_seen = time.monotonic()
        self._tracks: dict[int, _Track] = {}  # tracks by index

    def packet(self, packet: Packet[Any], *, video: bool) -> None:
        """Notes a packet, and shifts its stamps if they step back.

        Args:
            packet: the demuxed packet; its `pts` and `dts` are changed after a joint.
            video: whether `time` is called for its frames.
        """
        if not self._live:
            self._join(packet)
        stamp = self._sort_key(packet)
        if video and stamp is not None and not packet.is_discard:
            heapq.heappush(self._stamps, stamp)
            if len(self._stamps) > LONGEST_REORDER:  # The decoder has lost some of their frames.
                heapq.heappop(self._stamps)

    def lost(self, packet: Packet[Any]) -> None:
        """Forgets a packet that could not be decoded, since no frame will use its stamp."""
        stamp = self._sort_key(packet)
        if stamp in self._stamps:
            self._stamps.remove(stamp)
            heapq.heapify(self._stamps)

    def time(self, frame: VideoFrame) -> tuple[int | None, Fraction]:
        """Returns the stamp and the time of the next frame in presentation order.

        Returns:
            The time stamp in units of the stream, or None for a frame without one; and the seconds from
            the start of the video, a multiple of `unit` and greater than the last frame's.
        """
        self.last_seen = time.monotonic()
        if self._first_seen is None:
            self._first_seen = self.last_seen
        elapsed = Fraction(self.last_seen - self._first_seen)
        stamped_before = self._last_stamp is not None
        stamp = self._stamp(frame)
        if stamp is None:
            # If no frame of a live source has a stamp, only our clock tells the time.
            moment = elapsed if self._live and self.shift is None else self._following()
            self._unstamped = self._unstamped or not stamped_before
        else:
            seconds = stamp * self._stamp_unit
            if self._unstamped:  # FFmpeg gives the first frame of an RTSP stream no stamp.
                self.shift, self._unstamped = self._following() - seconds, False
            elif self.shift is None or (
                self._live and abs(seconds + self.shift - elapsed) > CLOCK_SECONDS
            ):
                self.shift = elapsed - seconds
            moment = seconds + self.shift
        moment = round(moment / self.unit) * self.unit
        self._last_time = max(moment, self._last_time + self.unit)
        return stamp, self._last_time

    def reconnected(self, stream: VideoStream) -> None:
        """Starts over with the new `stream` after a live source was opened again."""
        self._stamp_unit = stream.time_base or self.unit
        self.shift = self._last_stamp = None
        self._unstamped = False
        self._stamps.clear()

    def _following(self) -> Fraction:
        """Returns the time at which the next frame is due by the rate."""
        return self._last_time + 1 / self._rate if self._last_time >= 0 else Fraction(0)

    def _sort_key(self, packet: Packet[Any]) -> int | None:
        return packet.dts if self._by_dts or packet.pts is None else packet.pts

    def _stamp(self, frame: VideoFrame) -> int | None:
        """Returns the frame's stamp, or the next sorted stamp if the container's are out of order."""
        stamp = frame.pts
        if not self._sorted and not self._live and stamp is not None:
            self._sorted = self._last_stamp is not None and stamp <= self._last_stamp
        if self._sorted and self._stamps:
            stamp = heapq.heappop(self._stamps)
        elif stamp is not None:
            while self._stamps and self._stamps[0] <= stamp:
                heapq.heappop(self._stamps)
        if stamp is not None:
            self._last_stamp = stamp
        return stamp

    def _join(self, packet: Packet[Any]) -> None:
        """Shifts the stamps of a packet behind a joint, so that its part follows the previous one."""
        decoded = packet.dts if packet.dts is not None else packet.pts
        shown = packet.pts if packet.pts is not None else packet.dts
        if decoded is None or shown is None or packet.time_base is None:
            return
        track = self._tracks.setdefault(packet.stream_index, _Track())
        if track.decoded is not None:
            step = decoded - track.decoded
            if -step * packet.time_base > JOINT_SECONDS:
                track.offset = track.end - shown
            elif step > 0:
                track.step = step
        track.decoded = decoded
        track.end = max(track.end, shown + track.offset + (packet.duration or track.step))
        if track.offset:
            packet.pts = None if packet.pts is None else packet.pts + track.offset
            packet.dts = None if packet.dts is None else packet.dts + track.offset


@dataclass(slots=True)
class _Track:
    """The progress of a track's packets, in units of its time stamps.

    Attributes:
        decoded: the last packet's stamp in decoding order, as it was read.
        step: the difference of the last two of these stamps; the duration of a packet without one.
        end: the end of the last frame in presentation order, with `offset`.
        offset: the number that is added to stamps since the last joint.
    """

    decoded: int | None = None
    step: int = 0
    end: int = 0
    offset: int = 0
