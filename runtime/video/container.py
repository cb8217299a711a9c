"""Opens video files, cameras and streams with PyAV, and reads what their containers state.

Every error of PyAV or FFmpeg becomes a `VideoError` that names the source.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from comask.errors import BackendUnavailableError, ComaskError, ImageError, VideoError
from comask.media_files import VIDEO_SUFFIXES
from comask.preprocess import Pixels, opened_image

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.audio.stream import AudioStream
    from av.codec.hwaccel import HWAccel
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream

SCHEMES = {"rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "udp", "rtp", "srt", "tcp"}

_CAMERA = re.compile(r"camera:(\d+)|(/dev/video\d+)")

_TOLERANCE = math.sin(math.radians(1))  # like FFmpeg, treats an angle within one degree as exact

TIMEOUT_SECONDS = 10.0  # A stream without data for this time counts as lost.
MICROSECONDS = 1_000_000  # per second; FFmpeg states durations in microseconds
# FFmpeg also opens numbered image files, GIFs and text files as video; these formats are not video here.
_STILL_FORMATS = re.compile(r"image2|.*_pipe|tty|gif|apng")
_STILL_BRANDS = {"avif", "avis", "heic", "heix", "mif1", "msf1"}


def is_address(text: str) -> bool:
    """Returns whether `text` names a camera or a stream rather than a file."""
    scheme, separator, _ = text.partition("://")
    return bool(is_camera(text) or (separator and scheme.lower() in SCHEMES))


def is_camera(text: str) -> bool:
    """Returns whether `text` names a camera of this machine."""
    return camera_device(text) is not None


def camera_device(text: str) -> str | None:
    """Returns a camera's device file (`/dev/video0` for `camera:0`); None if `text` names no camera."""
    camera = _CAMERA.fullmatch(text)
    return camera and (camera[2] or f"/dev/video{camera[1]}")


def address_of_file(path: Path) -> str:
    """Returns an address that always means the local file `path`, even if it is called `camera:0`."""
    return f"./{path}" if is_address(str(path)) else str(path)


def shown_name(address: str) -> str:
    """Returns `address` without user, password and query, which may hold secrets."""
    if not is_address(address) or is_camera(address):
        return address
    scheme, _, rest = address.partition("://")
    if "@" in rest and "@" not in re.split("[/?#]", rest, maxsplit=1)[0]:
        rest = rest.rpartition("@")[2]  # The part before it may be an unescaped password.
    try:
        parts = urlsplit(f"{scheme}://{rest}")
    except ValueError:  # for example, an IPv6 address without its closing bracket
        return f"{address.partition('://')[0]}://…"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def file_name(address: str) -> str:
    """Returns a name for the results of `address`: the file's name, or a cleaned-up stream address."""
    if not is_address(address):
        return Path(address).name
    name = shown_name(address).partition("://")[2] or address
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")


@dataclass(frozen=True, slots=True)
class Orientation:
    """The steps that turn a decoded frame upright: swap the axes first, then mirror them.

    Attributes:
        transposed: whether rows and columns are swapped.
        mirror_x: whether left and right are swapped, after `transposed` was applied.
        mirror_y: whether top and bottom are swapped, after `transposed` was applied.
    """

    transposed: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def upright(self, pixels: Pixels) -> Pixels:
        """Returns `pixels` (u8 [h, w, 3]) as a player shows them, in contiguous memory."""
        turned = pixels.transpose(1, 0, 2) if self.transposed else pixels
        turned = turned[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]
        return np.ascontiguousarray(turned)


UPRIGHT = Orientation()


def frame_orientation(frame: VideoFrame) -> Orientation:
    """Returns the orientation that a frame's display matrix states; `UPRIGHT` if it has no matrix.

    Raises:
        VideoError: the matrix turns by an angle that is not a multiple of 90 degrees, or shears.
    """
    # `frame.side_data` would create a reference cycle that keeps frames alive until a garbage collection.
    from av.sidedata.sidedata import SideDataContainer

    container: Any = SideDataContainer  # Its stub lacks the argument.
    matrix = container(frame).get("DISPLAYMATRIX")
    return UPRIGHT if matrix is None else orientation_from_matrix(bytes(matrix))


def orientation_from_matrix(content: bytes) -> Orientation:
    """Returns the orientation that a display matrix describes.

    The matrix maps a pixel (x, y) to (a·x + c·y, b·x + d·y), up to scale and shift (ISO/IEC 14496-12,
    track header; FFmpeg's libavutil/display.h). Like players, this function ignores the scale, and
    ignores a matrix that maps an axis to zero length.

    Args:
        content: nine i32 in the machine's byte order: a, b, u, c, d, v, x, y, w.

    Raises:
        VideoError: the matrix turns by an angle that is not a multiple of 90 degrees, or shears.
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", content[:36])
    lengths = math.hypot(a, b), math.hypot(c, d)
    if not all(lengths):
        return UPRIGHT
    a, b, c, d = a / lengths[0], b / lengths[0], c / lengths[1], d / lengths[1]
    if max(abs(b), abs(c)) < _TOLERANCE:
        return Orientation(mirror_x=a < 0, mirror_y=d < 0)
    if max(abs(a), abs(d)) < _TOLERANCE:
        return Orientation(transposed=True, mirror_x=c < 0, mirror_y=b < 0)
    raise VideoError(
        f"its display matrix turns the picture by {math.degrees(math.atan2(b, a)):.0f} degrees; only "
        f"multiples of 90 can be shown upright: rotate it by 'ffmpeg -i IN -c:v libx264 OUT', which "
        f"applies the matrix"
    )


def import_av() -> ModuleType:
    """Imports and returns PyAV.

    Raises:
        BackendUnavailableError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise BackendUnavailableError(
            "video needs PyAV, which is not installed: pip install 'comask[video]'"
        ) from error
    return av


@contextlib.contextmanager
def video_errors(name: str, doing: str = "cannot be read") -> Iterator[None]:
    """Turns every exception of PyAV in the block into a `VideoError` that names the source.

    FFmpeg's errors derive from OSError, ValueError, EOFError, or none of these. PyAV raises
    AttributeError and others for a file that FFmpeg reads but PyAV does not understand.
    """
    try:
        yield
    except ComaskError:
        raise
    except Exception as error:
        raise VideoError(f"{name}: {doing}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Returns the message of PyAV's error without the address, which may hold a password."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def file_url(path: str | Path) -> str:
    """Returns FFmpeg's URL of a local file, which it cannot mistake for another address or an option."""
    return f"file:{os.path.abspath(path)}"


def is_video(path: Path) -> bool:
    """Returns whether a file's content is a video rather than an image.

    The suffix decides for a file that neither Pillow nor PyAV can open.
    """
    if not path.is_file():
        return False  # Reading from a pipe to find out could block for ever.
    with contextlib.suppress(ImageError), opened_image(path):
        return False  # GIFs count as images.
    by_suffix = path.suffix.lower() in VIDEO_SUFFIXES
    try:
        with open_container(address_of_file(path)) as container, video_errors(str(path)):
            brand = container.metadata.get("major_brand", "")
            if _STILL_FORMATS.fullmatch(container.format.name) or brand in _STILL_BRANDS:
                return False
            return video_stream(container) is not None or by_suffix
    except (BackendUnavailableError, VideoError):
        return by_suffix


def open_container(
    address: str, gpu: AbstractContextManager[HWAccel] | None = None
) -> InputContainer:
    """Opens a file, camera or stream for reading.

    Args:
        address: path of a file, `camera:0`, a device file, or an address with a scheme of `SCHEMES`.
        gpu: the codecs of the GPU to decode on, see `GpuCodecs`; None for the CPU.

    Raises:
        VideoError: the source cannot be opened.
        ComaskError: cameras cannot be read on this system.
        BackendUnavailableError: PyAV is not installed.
    """
    av = import_av()
    settings = dict[str, Any]()
    if int(av.__version__.split(".")[0]) < 19:  # Later versions accept any bytes in a tag.
        settings["metadata_errors"] = "replace"
    target: Any = address
    if device := camera_device(address):
        if sys.platform != "linux":
            raise ComaskError(f"{address}: cameras are read by Video4Linux; this is {sys.platform}")
        target = device
        settings["format"] = "video4linux2"
    elif is_address(address):
        # On a busy network, RTP over UDP loses packets; over TCP they are only late.
        settings |= {"timeout": TIMEOUT_SECONDS, "options": {"rtsp_flags": "prefer_tcp"}}
        scheme, _, rest = address.partition("://")
        target = f"{scheme.lower()}://{rest}"  # FFmpeg knows schemes in lower case only.
    else:
        target = file_url(address)
    with video_errors(shown_name(address), "cannot be opened"):
        if "%" in os.path.basename(address) and not is_address(address):
            # FFmpeg reads %d.png as 1.png, 2.png, …, and PyAV passes it the name of an open file. A file
            # that is opened by its descriptor has no name.
            target = os.fdopen(os.open(address, os.O_RDONLY), "rb")
        asked = time.monotonic()
        try:
            with gpu or contextlib.nullcontext() as hwaccel:
                container: InputContainer = av.open(target, hwaccel=hwaccel, **settings)
        except av.FFmpegError as error:
            if "timeout" in settings and time.monotonic() - asked >= TIMEOUT_SECONDS:
                # FFmpeg reports its own timeout under various other errors.
                raise TimeoutError(f"no answer for {TIMEOUT_SECONDS:.0f} s") from error
            raise
    return container


def video_stream(container: InputContainer) -> VideoStream | None:
    """Returns the video track to read: FFmpeg's choice, without still pictures and unknown codecs."""
    from av.stream import Disposition

    stills = Disposition.attached_pic | Disposition.still_image
    tracks = [
        track
        for track in container.streams.video
        if track.codec_context is not None and not track.disposition & stills
    ]
    best = container.streams.best("video")
    return best if best in tracks else max(tracks, key=_pixels, default=None)


def audio_stream(container: InputContainer) -> AudioStream | None:
    """Returns the audio track to keep: FFmpeg's choice if its codec is known, else the first known."""
    tracks = [track for track in container.streams.audio if track.codec_context is not None]
    best = container.streams.best("audio")
    return best if best in tracks else next(iter(tracks), None)


def left_out(container: InputContainer, *kept: Stream | None) -> list[str]:
    """Describes the tracks that an overlay leaves out: `1 subtitle track`, `2 data tracks`.

    Args:
        container: the source.
        kept: the tracks that the overlay keeps.
    """
    kinds = Counter(_kind(track) for track in container.streams if track not in kept)
    return [f"{n} {noun}{'s' * (n > 1)}{note}" for (noun, note), n in kinds.items()]


def _kind(track: Stream) -> tuple[str, str]:
    """Returns the noun for a track, and a note to append to it."""
    from av.stream import Disposition

    if track.disposition & (Disposition.attached_pic | Disposition.still_image):
        return "cover picture", ""
    decoded = track.type in ("audio", "video")
    return f"{track.type} track", " without a decoder" * (decoded and not track.codec_context)


class Completeness:
    """Compares how much of a file was read with the length that the file states.

    Args:
        container: the opened file.
        stream: its video track.
        rate: the stated frames per second.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, rate: Fraction) -> None:
        self._container, self._stream, self._rate = container, stream, rate
        self._format = container.format.name
        self._packets = 0
        self._last: Fraction | None = None  # decoding time of the last video packet
        self._longest = Fraction(0)  # longest time between two video packets
        self._video_end = self._any_end = Fraction(0)

    def packet(self, packet: Packet[Any]) -> None:
        """Counts one packet of any track."""
        video = packet.stream_index == self._stream.index
        self._packets += video
        # FFmpeg guesses the presentation times of AVI; only `dts` tells a packet's place in the file.
        guessed = packet.pts is None or self._format == "avi"
        stamp = packet.dts if guessed else packet.pts
        if stamp is None or packet.time_base is None:
            return
        end = (stamp + (packet.duration or 0)) * packet.time_base
        self._any_end = max(self._any_end, end)
        if not video:
            return
        if packet.dts is not None:
            decoded = packet.dts * packet.time_base
            if self._last is not None:
                self._longest = max(self._longest, decoded - self._last)
            self._last = decoded
        # A last frame of unknown duration may be shown as long as the longest one before it.
        self._video_end = max(self._video_end, end, stamp * packet.time_base + self._longest)

    def problem(self, frames: int) -> str | None:
        """Says what is missing at the end of the file; None if nothing is missing.

        Args:
            frames: the number of frames that the decoder returned.
        """
        if self._format.startswith("mov"):
            # MP4 indexes every packet that no edit list cuts off; fragments add theirs to the index.
            missing = len(self._stream.index_entries) - self._packets
            return f"it ends after {frames} of {frames + missing} frames" if missing > 0 else None
        stated = self._stated_video_end()
        if stated is not None:
            missing = round((stated - self._video_end) / (self._longest or 1 / self._rate))
            if missing >= 1:
                return f"it ends after {frames} of {frames + missing} frames"
        stated = self._stated_end()
        # The stated end is the longest track's, rounded, and may include its last frame's duration.
        if stated is not None and self._any_end < stated - max(Fraction(1, 10), 2 / self._rate):
            return f"its data ends at {float(self._any_end):.1f} s of {float(stated):.1f} s"
        return None

    def _stated_video_end(self) -> Fraction | None:
        """Returns the stated end of the video track, in seconds on the time stamps' scale."""
        track, unit = self._stream, self._stream.time_base
        # For AVI, FFmpeg's `duration` shrinks with a truncated file, so count the frames.
        if self._format == "avi" and track.frames and unit:
            return track.frames * unit
        # Matroska writers put the duration into a tag: 00:00:02.700000000
        written = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", track.metadata.get("DURATION", ""))
        if written and self._format.startswith("matroska"):
            hours, minutes, seconds = map(Fraction, written.groups())
            return 3600 * hours + 60 * minutes + seconds
        return None

    def _stated_end(self) -> Fraction | None:
        stated = self._container.duration
        if stated is None:
            return None
        # RTSP states the end of its times; FFmpeg takes their start from one of the first packets.
        start = 0 if self._format == "rtsp" else self._container.start_time or 0
        return Fraction(stated + start, MICROSECONDS)


def _pixels(track: VideoStream) -> int:
    return track.codec_context.width * track.codec_context.height
