"""What names a video: files by their content, `camera:0`, device files, and addresses of streams."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from comask.errors import BackendUnavailableError, ComaskError, ImageError, VideoError
from comask.preprocess import opened_image

if TYPE_CHECKING:
    from av.codec.hwaccel import HWAccel
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".wmv",
    ".flv", ".3gp", ".ogv", ".mxf",
}  # fmt: skip
SCHEMES = {"rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "udp", "rtp", "srt", "tcp"}
TIMEOUT_SECONDS = 10.0  # without data, after which a stream counts as lost

_CAMERA = re.compile(r"camera:(\d+)|(/dev/video\d+)")
# What FFmpeg also opens as video: images by the names of their files, and text as a terminal shows it.
_STILL_FORMATS = re.compile(r"image2|.*_pipe|tty|gif|apng")
_STILL_BRANDS = {"avif", "avis", "heic", "heix", "mif1", "msf1"}


def import_av() -> ModuleType:
    """PyAV.

    Raises:
        BackendUnavailableError: when it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise BackendUnavailableError(
            "video needs PyAV, which is not installed: pip install 'comask[video]'"
        ) from error
    return av


def is_address(text: str) -> bool:
    """Whether `text` names a camera or a stream rather than a file."""
    scheme, separator, _ = text.partition("://")
    return bool(_CAMERA.fullmatch(text) or (separator and scheme.lower() in SCHEMES))


def is_camera(text: str) -> bool:
    """Whether `text` names a camera of this machine."""
    return bool(_CAMERA.fullmatch(text))


def is_video(path: Path) -> bool:
    """Whether a file is a video rather than an image, by its content.

    A file that neither Pillow nor PyAV can open counts as what its suffix says.
    """
    if not path.is_file():
        return False  # a pipe might never say what it is
    with contextlib.suppress(ImageError), opened_image(path):
        return False  # GIF among them
    try:
        av = import_av()
    except BackendUnavailableError:
        return path.suffix.lower() in VIDEO_SUFFIXES
    try:
        with av.open(str(path)) as container:
            brand = container.metadata.get("major_brand", "")
            still = _STILL_FORMATS.fullmatch(container.format.name) or brand in _STILL_BRANDS
            return not still and video_stream(container) is not None
    except (
        BackendUnavailableError,
        OSError,
        ValueError,
    ):  # FFmpeg's errors are one of the latter two
        return path.suffix.lower() in VIDEO_SUFFIXES


def shown_name(address: str) -> str:
    """`address` without user, password and query, which hold secrets."""
    if not is_address(address) or is_camera(address):
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def file_name(address: str) -> str:
    """A name for the results of `address`: a file's own, or what is left of an address."""
    if not is_address(address):
        return Path(address).name
    name = shown_name(address).partition("://")[2] or address
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")


def open_container(address: str, hwaccel: HWAccel | None = None) -> InputContainer:
    """Opens a file, camera or stream for reading.

    Args:
        address: of it.
        hwaccel: the GPU to decode on, if any.

    Raises:
        VideoError: when it cannot be opened.
        BackendUnavailableError: when PyAV is not installed.
    """
    av = import_av()
    target, settings = address, dict[str, Any](hwaccel=hwaccel)
    if int(av.__version__.split(".")[0]) < 19:  # later ones read any bytes as a tag
        settings["metadata_errors"] = "replace"
    if camera := _CAMERA.fullmatch(address):
        if sys.platform != "linux":
            raise ComaskError(f"{address}: cameras are read by Video4Linux; this is {sys.platform}")
        target = camera[2] or f"/dev/video{camera[1]}"
        settings["format"] = "video4linux2"
    elif is_address(address):
        # RTP over UDP loses packets where a network is busy; over TCP it is late instead.
        settings |= {"timeout": TIMEOUT_SECONDS, "options": {"rtsp_flags": "prefer_tcp"}}
    try:
        container: InputContainer = av.open(target, **settings)
    except av.FFmpegError as error:
        raise VideoError(f"{shown_name(address)}: cannot be opened: {reason(error)}") from error
    if video_stream(container) is None:
        container.close()
        raise VideoError(f"{shown_name(address)}: holds no video that can be decoded")
    return container


def video_stream(container: InputContainer) -> VideoStream | None:
    """The best video stream for which there is a decoder; a song's cover is none."""
    from av.stream import Disposition

    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        return None
    return None if stream.disposition & Disposition.attached_pic else stream  # type: ignore[return-value]


def reason(error: BaseException) -> str:
    """What PyAV's error says, without the address, which may hold a password."""
    return str(getattr(error, "strerror", None) or error)
