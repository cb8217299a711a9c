"""Recognises images and videos by their suffix or, if that is unknown, by their first bytes."""

from __future__ import annotations

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from comask.errors import ComaskError, one_line

JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"})
IMAGE_SUFFIXES = JPEG_SUFFIXES | frozenset({
    ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".dib",
    ".gif", ".jp2", ".j2k", ".ppm", ".pgm", ".pnm", ".avif", ".heic", ".heif",
})  # fmt: skip
VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".ts", ".m2ts", ".mts", ".mpg",
    ".mpeg", ".m2v", ".vob", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".nut",
    ".dv", ".h264", ".hevc", ".mjpeg", ".y4m",
})  # fmt: skip
HEAD_BYTES = 400  # `kind_from_content` needs this number of bytes

Kind = Literal["image", "video", "result", "hidden", "other"]

_IMAGE_CONTENT = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0\0\0\0|II\*\0|MM\0\*|RIFF.{4}WEBP"
    rb"|\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51|P[2356]\s"
    rb"|.{4}ftyp(avif|avis|heic|heix|heim|heis|hevc|mif1|msf1)",
    re.DOTALL,
)
_VIDEO_CONTENT = re.compile(
    rb".{4}(ftyp|moov|mdat|wide)|\x1a\x45\xdf\xa3|RIFF.{4}AVI |FLV\x01|\0\0\x01[\xb3\xba]"
    rb"|\x30\x26\xb2\x75|OggS|(.{4})?\x47.{187}(.{4})?\x47",
    re.DOTALL,
)
# The files that `comask infer` writes: photo.jpg.overlay.jpg, photo.jpg.2.mask.png, …
_RESULT = re.compile(
    r".+\.(overlay\.(png|jpg|mp4|mkv)|labels\.txt|jsonl)|.+\.(\w{2,5}|\d+)\.mask\.png"
    r"|\d{6,}\.(thumb|view)\.jpg"
    r"|(detections|images)\.json"
)
_SHOWN = 3  # file names that a line shows
_WORDS: dict[Kind, str] = {
    "result": "results of an earlier run",
    "other": "files that are neither images nor videos",
    "image": "images",
    "video": "videos",
}


def kind_from_content(head: bytes) -> Kind:
    """Returns a file's kind by its first `HEAD_BYTES` bytes: `image`, `video` or `other`."""
    if _IMAGE_CONTENT.match(head):
        return "image"
    return "video" if _VIDEO_CONTENT.match(head) else "other"


def kind_from_name(name: str) -> Kind:
    """Returns a file's kind by its name; `other` means that only the content can tell."""
    if name.startswith("._"):
        return "hidden"  # macOS writes such a file beside each file
    if _RESULT.fullmatch(name):
        return "result"
    suffix = Path(name).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "hidden" if name.startswith(".") else "other"


def kind_of_file(path: Path) -> Kind:
    """Returns a local file's kind by its name or, if that does not tell, by its content."""
    kind = kind_from_name(path.name)
    if kind != "other":
        return kind
    try:
        if not path.is_file():  # reading a pipe may never end
            return "other"
        with path.open("rb") as file:
            return kind_from_content(file.read(HEAD_BYTES))
    except OSError:
        return "other"


@dataclass(slots=True)
class PassedOver:
    """A count of the files of a folder or pattern that are left out."""

    _counts: Counter[Kind] = field(default_factory=Counter)
    _names: dict[Kind, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: Kind, name: str) -> None:
        """Counts one file."""
        self._counts[kind] += 1
        if len(self._names[kind]) < _SHOWN:
            self._names[kind].append(one_line(name))

    def lines(self, where: str) -> list[str]:
        """Returns one line per kind for the user; hidden files are not mentioned."""
        lines = []
        for kind, words in _WORDS.items():
            if count := self._counts[kind]:
                shown = ", ".join(self._names[kind]) + (", …" if count > _SHOWN else "")
                lines.append(f"{one_line(where)}: passed over {count} {words}: {shown}")
        return lines


def find_media(text: str, kinds: frozenset[Kind], passed_over: PassedOver) -> list[Path]:
    """Returns the files that an input of a command names: a file, or those of a folder or pattern.

    A folder gives the files of the given kinds that lie directly in it, sorted by name. A file or a
    pattern gives all files that it names, except for results of comask itself; so the list may be empty.

    Args:
        text: the path of a file or folder, or a `glob` pattern.
        kinds: `image`, `video`, or both.
        passed_over: counts the files that are left out.

    Raises:
        ComaskError: when nothing matches.
    """
    path = Path(text)
    is_folder = path.is_dir()
    if is_folder:
        kind_of, accepted = {entry: kind_of_file(entry) for entry in sorted(path.iterdir())}, kinds
    else:
        named = [path] if path.exists() else sorted(match_pattern(text))
        if not named:
            raise ComaskError(f"{text}: no such file or folder, and no file matches it")
        kind_of = {file: kind_from_name(file.name) for file in named}
        accepted = frozenset(get_args(Kind)) - {"result"}
    files = []
    for file, kind in kind_of.items():
        if kind in accepted:
            files.append(file)
        elif not file.is_dir():
            passed_over.add(kind, file.name)
    if not files and is_folder:
        wanted = "image or video" if "video" in kinds else "image"
        raise ComaskError(
            f"{text}: no {wanted} lies directly in it; subfolders are not searched: "
            f"'{path / '**/*.jpg'}'"
        )
    return files


def match_pattern(text: str) -> Iterator[Path]:
    """Yields the files that a pattern matches; existing folders may have names such as `a[1]`."""
    path = Path(text)
    literal = next((above for above in path.parents if above.is_dir()), Path())
    pattern = f"{glob.escape(str(literal))}/{path.relative_to(literal)}"
    for match in glob.iglob(pattern, recursive=True):
        if Path(match).is_file():
            yield Path(match)
