"""The time of each frame of a video: seconds from its start, in presentation order."""

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

MICROSECONDS = 1_000_000  # in a second; FFmpeg's unit of durations
CLOCK_SECONDS = 60.0  # by which a live source's time stamps may differ from our clock
JOINT_SECONDS = 1.0  # time stamps that step back by more begin a new part of the video
LONGEST_REORDER = 64  # packets; no decoder holds back more frames than this, its threads included
# Containers that store packets in decoding order and no presentation times. FFmpeg guesses some.
WITHOUT_PRESENTATION_TIMES = {"avi"}


class FrameTimes:
    """Works out when each frame is shown.

    Every packet of the container goes through `packet` before it is decoded, every video frame through
    `time` after it was. A decoder gives frames in presentation order, so each frame's time exceeds the
    one before. Where the container's time stamps say otherwise:

    - A container without presentation times (AVI), or one whose stamps are out of order, has them sorted:
      the n-th frame gets the n-th smallest stamp.
    - Stamps that step back by more than a second begin a new part, as in files that were joined end to
      end. The part follows the one before it without a gap.
    - A frame without a stamp comes one frame after its predecessor, and so does the first one with a
      stamp after frames without.

    A live source's times follow our clock: its first frame is at 0, and after a lost connection, or when
    a camera's clock was set, the clock says how much time went by.

    Args:
        container: the opened source.
        stream: its video stream.
        rate: frames per second as stated.
        live: whether the source is a camera or an endless stream.

    Attributes:
        unit: seconds per unit of a time stamp; `time` gives multiples of it.
        shift: seconds from the container's time stamps to ours; None until a live source's next frame.
        last_seen: when the last frame came, by `time.monotonic`.
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
        self._stamps: list[int] = []  # heap: stamps of packets whose frames are still to come
        self._last_stamp: int | None = None
        self._unstamped = False  # whether frames without a stamp came before the first with one
        self._last_time = -self.unit
        self._first_seen: float | None = None
        self.last_seen = time.monotonic()
        self._tracks: dict[int, _Track] = {}  # by index

    def packet(self, packet: Packet[Any], *, video: bool) -> None:
        """Notes a packet, and moves its stamps so that they follow those before.

        Args:
            packet: as demuxed; its `pts` and `dts` change after a joint.
            video: whether its frames go through `time`.
        """
        if not self._live:
            self._join(packet)
        stamp = self._sort_key(packet)
        if video and stamp is not None and not packet.is_discard:
            heapq.heappush(self._stamps, stamp)
            if len(self._stamps) > LONGEST_REORDER:  # the decoder lost some of their frames
                heapq.heappop(self._stamps)

    def lost(self, packet: Packet[Any]) -> None:
        """Forgets a packet that could not be decoded: no frame will take its stamp."""
        stamp = self._sort_key(packet)
        if stamp in self._stamps:
            self._stamps.remove(stamp)
            heapq.heapify(self._stamps)

    def time(self, frame: VideoFrame) -> tuple[int | None, Fraction]:
        """The stamp and the time of the next frame in presentation order.

        Returns:
            The time stamp in units of the stream, None for a frame without one; and seconds from the
            start of the video, a multiple of `unit`, greater than the last frame's.
        """
        self.last_seen = time.monotonic()
        if self._first_seen is None:
            self._first_seen = self.last_seen
        elapsed = Fraction(self.last_seen - self._first_seen)
        stamped_before = self._last_stamp is not None
        stamp = self._stamp(frame)
        if stamp is None:
            # Where no frame of a live source has a stamp, only our own clock knows.
            moment = elapsed if self._live and self.shift is None else self._following()
            self._unstamped = self._unstamped or not stamped_before
        else:
            seconds = stamp * self._stamp_unit
            if self._unstamped:  # FFmpeg gives the first frame of an RTSP stream no stamp
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
        """Begins anew after a live source was opened again, with its new `stream`."""
        self._stamp_unit = stream.time_base or self.unit
        self.shift = self._last_stamp = None
        self._unstamped = False
        self._stamps.clear()

    def _following(self) -> Fraction:
        """When the next frame is due by the rate."""
        return self._last_time + 1 / self._rate if self._last_time >= 0 else Fraction(0)

    def _sort_key(self, packet: Packet[Any]) -> int | None:
        return packet.dts if self._by_dts or packet.pts is None else packet.pts

    def _stamp(self, frame: VideoFrame) -> int | None:
        """The frame's stamp, out of the sorted ones where the container's are out of order."""
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
        """Moves the stamps of a packet behind a joint, so that its part follows the one before."""
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
    """How far the packets of a track have come, in units of its time stamps.

    Attributes:
        decoded: the last packet's stamp in decoding order, as it was read.
        step: between the last two of these; how long a packet lasts that does not say so.
        end: where the last frame in presentation order ends, after `offset`.
        offset: what is added to its stamps since the last joint.
    """

    decoded: int | None = None
    step: int = 0
    end: int = 0
    offset: int = 0
