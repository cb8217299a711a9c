"""Lists the images of a job, each once and sorted, so that the order of the inputs does not matter."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import logging
import os
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO

from comask.errors import ComaskError, one_line
from comask.files import parse_json
from comask.media_files import (
    VIDEO_SUFFIXES,
    Kind,
    PassedOver,
    kind_from_name,
    kind_of_file,
    match_pattern,
)
from comask.runtime.jobs.folder import file_system, is_url
from comask.runtime.video.container import is_address

SORT_MEMORY = 200_000  # KiB; SQLite sorts more than that on the disk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listing:
    """A file with one address per line, as a JSON string, which can hold any file name.

    Attributes:
        file: the open file.
        images: the number of lines.
        sha256: the file's SHA-256.
        offsets: the byte offset of each shard, and the file's size.
    """

    file: BinaryIO
    images: int
    sha256: str
    offsets: array[int]


def write_listing(inputs: Iterable[str], file: BinaryIO, shard: int) -> Listing:
    """Writes a sorted list of the images that the inputs name, without holding it in memory.

    Args:
        inputs: the inputs, see `addresses`.
        file: an empty file to write to.
        shard: images per shard.

    Raises:
        ComaskError: an input cannot be listed, see `addresses`; or the inputs name no image.
    """
    with contextlib.closing(sqlite3.connect("")) as table:  # "" means a temporary file.
        table.execute(f"PRAGMA cache_size = -{SORT_MEMORY}")
        table.execute("CREATE TABLE images (line TEXT PRIMARY KEY) WITHOUT ROWID")
        for text in inputs:
            lines = ((json.dumps(address),) for address in addresses(text))
            table.executemany("INSERT OR IGNORE INTO images VALUES (?)", lines)
        digest, offsets, images, end = hashlib.sha256(), array("Q"), 0, 0
        for (line,) in table.execute("SELECT line FROM images ORDER BY line"):
            if images % shard == 0:
                offsets.append(end)
            content = line.encode() + b"\n"
            digest.update(content)
            end += file.write(content)
            images += 1
        offsets.append(end)
    if not images:
        raise ComaskError(f"{', '.join(inputs)}: names no image")
    return Listing(file, images, digest.hexdigest(), offsets)


def addresses(text: str) -> Iterator[str]:
    """Yields the images that an input names; local paths are made absolute.

    Files in a local folder are images by their suffix or content; files in other storage, by their
    suffix only. The number of files that were passed over is logged.

    Args:
        text: an image, a folder, a pattern, or `@` and a list with one address per line (in `….jsonl`,
            each line is a JSON string, or an object with `file`). Each is a local path or an fsspec URL.

    Raises:
        ComaskError: the input names nothing, names a video or stream, or cannot be listed.
    """
    text = text.removeprefix("file://")  # Every file must have only one address.
    web = text.lower().startswith(("http://", "https://"))
    if PurePath(text).suffix.lower() in VIDEO_SUFFIXES or (is_address(text) and not web):
        raise ComaskError(
            f"{text}: 'comask job' runs images only; run videos and streams with 'comask infer'"
        )
    try:
        if text.startswith("@"):
            yield from _listed(text[1:])
        elif web:
            yield text  # The web has no folders.
        elif is_url(text):
            yield from _remote(text)
        else:
            yield from _local(text)
    except ComaskError:
        raise
    except Exception as error:  # Each storage raises its own exceptions.
        raise ComaskError(f"{text}: cannot be listed: {one_line(error)}") from error


def _local(text: str) -> Iterator[str]:
    path = os.path.abspath(text)
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            files = (entry.path for entry in entries if not entry.is_dir())
            yield from _images(text, files, lambda file: kind_of_file(Path(file)))
    elif os.path.exists(path):
        yield path
    elif not glob.has_magic(text):
        raise ComaskError(f"{text}: no such file or folder")
    else:
        yield from _images(text, map(os.path.abspath, match_pattern(text)), _named)


def _remote(text: str) -> Iterator[str]:
    fs, path = file_system(text)
    if glob.has_magic(path) and not fs.exists(path):
        matches = (str(match) for match in fs.glob(path) if not fs.isdir(match))
        yield from _images(text, map(fs.unstrip_protocol, matches), _named)
    elif fs.isdir(path):
        files = map(fs.unstrip_protocol, fs.ls(path, detail=False))
        yield from _images(text, files, lambda file: kind_from_name(PurePath(file).name))
    elif fs.exists(path):
        yield fs.unstrip_protocol(path)
    else:
        raise ComaskError(f"{text}: no such file or folder")


def _named(address: str) -> Kind:
    """Returns the kind of a file that a pattern names: any file counts as an image but comask's own."""
    return "result" if kind_from_name(PurePath(address).name) == "result" else "image"


def _images(text: str, addresses: Iterable[str], kind_of: Callable[[str], Kind]) -> Iterator[str]:
    """Yields the addresses of those of an input's files that are images."""
    passed_over, images = PassedOver(), 0
    for address in addresses:
        kind = kind_of(address)
        if kind == "image":
            images += 1
            yield address
        else:
            passed_over.add(kind, PurePath(address).name)
    for line in passed_over.lines(text):
        logger.warning("%s", line)
    if not images and glob.has_magic(text):
        raise ComaskError(f"{text}: no such file or folder, and no file matches it")
    if not images:
        raise ComaskError(
            f"{text}: no image lies directly in it; a pattern with /**/ also finds images in its "
            f"subfolders"
        )


def _listed(file: str) -> Iterator[str]:
    """Yields the addresses in a list."""
    fs, path = file_system(file)
    try:
        kind = fs.info(path)["type"]
    except FileNotFoundError:  # `isfile` would also hide all other errors.
        kind = ""
    if kind != "file":
        raise ComaskError(f"@{file}: no such list")
    with fs.open(path, "rb") as content:
        # "-sig" skips the byte order mark of text files from Windows.
        lines = io.TextIOWrapper(content, "utf-8-sig", errors="surrogateescape", newline="\n")
        for number, line in enumerate(lines, 1):
            address = line.rstrip("\r\n")
            if not address:
                continue
            if file.lower().endswith(".jsonl"):
                address = _from_json(address, f"@{file}: line {number}")
            address = address.removeprefix("file://")
            yield address if is_url(address) else os.path.abspath(address)


def _from_json(line: str, place: str) -> str:
    """Returns the address in a line of a listing, a part or `failures.jsonl`."""
    try:
        content = parse_json(line)
    except ValueError:
        content = None
    address = content.get("file") if isinstance(content, dict) else content
    if not isinstance(address, str):
        raise ComaskError(f'{place}: expected a JSON string, or an object with "file"')
    return address
