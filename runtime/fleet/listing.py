"""The listing of a job: which images there are, each once, in an order that is not the inputs'."""

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
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import BinaryIO

from comask.runtime.fleet.folder import file_system, is_url
from comask.runtime.video.address import VIDEO_SUFFIXES, is_address

from comask.errors import ComaskError, one_line
from comask.parse_json import parse_json

SORT_MEMORY = 200_000  # KiB; what does not fit waits on the disk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listing:
    """A file with an address a line, each a JSON string, so that any file name fits.

    Attributes:
        file: that was written, open.
        images: lines in it.
        sha256: of the file.
        offsets: bytes before each shard, and behind the last one.
    """

    file: BinaryIO
    images: int
    sha256: str
    offsets: array[int]


def write_listing(
    inputs: Iterable[str], suffixes: frozenset[str], file: BinaryIO, shard: int
) -> Listing:
    """Lists the images that inputs name, sorted, without having them all in memory.

    Args:
        inputs: see `addresses`.
        suffixes: see `addresses`.
        file: to write, empty.
        shard: images a shard.

    Raises:
        ComaskError: see `addresses`; or there is no image.
    """
    with contextlib.closing(sqlite3.connect("")) as table:  # "": a file of its own, gone afterwards
        table.execute(f"PRAGMA cache_size = -{SORT_MEMORY}")
        table.execute("CREATE TABLE images (line TEXT PRIMARY KEY) WITHOUT ROWID")
        for text in inputs:
            lines = ((json.dumps(address),) for address in addresses(text, suffixes))
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


def addresses(text: str, suffixes: frozenset[str]) -> Iterator[str]:
    """The images that an input names; local paths are made absolute.

    Args:
        text: an image, a folder, a pattern, or `@` and a list with an address a line (in `….jsonl`,
            JSON: a string, or an object with `file`, a line); each local or at an address that
            fsspec knows.
        suffixes: of a folder's files that are images, with their dots.

    Raises:
        ComaskError: when it names nothing, a video or stream, or cannot be listed.
    """
    text = text.removeprefix("file://")  # so that no file has two addresses
    web = text.lower().startswith(("http://", "https://"))
    if PurePath(text).suffix.lower() in VIDEO_SUFFIXES or (is_address(text) and not web):
        raise ComaskError(f"{text}: --runner is for images; run videos and streams without it")
    try:
        if text.startswith("@"):
            yield from _listed(text[1:])
        elif web:
            yield text  # which has no folders
        elif is_url(text):
            yield from _remote(text, suffixes)
        else:
            yield from _local(text, suffixes)
    except ComaskError:
        raise
    except Exception as error:  # each storage has its own kinds
        raise ComaskError(f"{text}: cannot be listed: {one_line(error)}") from error


def _local(text: str, suffixes: frozenset[str]) -> Iterator[str]:
    path = os.path.abspath(text)
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            yield from _images(text, (entry.path for entry in entries), suffixes)
    elif os.path.exists(path):
        yield path
    else:
        found = 0
        for match in glob.iglob(text, recursive=True):
            if os.path.isfile(match):
                found += 1
                yield os.path.abspath(match)
        if not found:
            raise ComaskError(f"{text}: no such file or folder, and no file matches it")


def _remote(text: str, suffixes: frozenset[str]) -> Iterator[str]:
    fs, path = file_system(text)
    if glob.has_magic(path) and not fs.exists(path):
        found = [str(match) for match in fs.glob(path) if not fs.isdir(match)]
        if not found:
            raise ComaskError(f"{text}: no file matches it")
        yield from map(fs.unstrip_protocol, found)
    elif fs.isdir(path):
        entries = (fs.unstrip_protocol(name) for name in fs.ls(path, detail=False))
        yield from _images(text, entries, suffixes)
    elif fs.exists(path):
        yield fs.unstrip_protocol(path)
    else:
        raise ComaskError(f"{text}: no such file or folder")


def _images(folder: str, files: Iterable[str], suffixes: frozenset[str]) -> Iterator[str]:
    """Of a folder's files those that are images."""
    seen: Counter[str] = Counter()
    for file in files:
        suffix = PurePath(file).suffix.lower()  # as `comask-infer` without --runner reads it
        seen["images"] += suffix in suffixes
        seen["videos"] += suffix in VIDEO_SUFFIXES
        if suffix in suffixes:
            yield file
    if not seen["images"]:
        raise ComaskError(
            f"{folder}: holds no such files: {', '.join(sorted(suffixes))}; "
            f"a pattern with /**/ finds those in folders below"
        )
    if seen["videos"]:
        logger.warning("%s: left out %d videos; run them without --runner", folder, seen["videos"])


def _listed(file: str) -> Iterator[str]:
    """The addresses in a list."""
    fs, path = file_system(file)
    if not fs.isfile(path):
        raise ComaskError(f"@{file}: no such list")
    with fs.open(path, "rb") as content:
        # "-sig": without the mark that Windows begins a text with
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
    """An address as a listing has it, or as parts and `failures.jsonl` do."""
    try:
        content = parse_json(line)
    except ValueError:
        content = None
    address = content.get("file") if isinstance(content, dict) else content
    if not isinstance(address, str):
        raise ComaskError(f'{place}: expected a JSON string, or an object with "file"')
    return address
