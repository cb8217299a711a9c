"""Names of videos: paths of files, `camera:0`, device files, and addresses of streams."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

SCHEMES = {"rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "udp", "rtp", "srt", "tcp"}

_CAMERA = re.compile(r"camera:(\d+)|(/dev/video\d+)")


def is_address(text: str) -> bool:
    """Whether `text` names a camera or a stream rather than a file."""
    scheme, separator, _ = text.partition("://")
    return bool(is_camera(text) or (separator and scheme.lower() in SCHEMES))


def is_camera(text: str) -> bool:
    """Whether `text` names a camera of this machine."""
    return camera_device(text) is not None


def camera_device(text: str) -> str | None:
    """The device file of a camera: `/dev/video0` for `camera:0`; None where `text` names none."""
    camera = _CAMERA.fullmatch(text)
    return camera and (camera[2] or f"/dev/video{camera[1]}")


def address_of_file(path: Path) -> str:
    """What names a local file, even one that is called camera:0."""
    return f"./{path}" if is_address(str(path)) else str(path)


def shown_name(address: str) -> str:
    """`address` without user, password and query, which hold secrets."""
    if not is_address(address) or is_camera(address):
        return address
    scheme, _, rest = address.partition("://")
    if "@" in rest and "@" not in re.split("[/?#]", rest, maxsplit=1)[0]:
        rest = rest.rpartition("@")[2]  # before it may lie a password that is not escaped
    try:
        parts = urlsplit(f"{scheme}://{rest}")
    except ValueError:  # as of an unfinished [IPv6 address
        return f"{address.partition('://')[0]}://…"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def file_name(address: str) -> str:
    """A name for the results of `address`: a file's own, or what is left of an address."""
    if not is_address(address):
        return Path(address).name
    name = shown_name(address).partition("://")[2] or address
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")
