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


def write_listing(inputs: Iterable[str], file: BinaryIO, shard: int) -> Listing:
    """Lists the images that inputs name, sorted, without having them all in memory.

    Args:
        inputs: see `addresses`.
        file: to write, empty.
        shard: images a shard.

    Raises:
        ComaskError: see `addresses`; or there is no image.
    """
    with contextlib.closing(sqlite3.connect("")) as table:  # "": a file of its own, gone afterwards
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
    """The images that an input names; local paths are made absolute.

    A local folder gives the files that are images by their suffix or content, one at an address of fsspec
    those that are by their suffix. How many files are passed over is logged.

    Args:
        text: an image, a folder, a pattern, or `@` and a list with an address a line (in `….jsonl`,
            JSON: a string, or an object with `file`, a line); each local or at an address that
            fsspec knows.

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
            yield from _remote(text)
        else:
            yield from _local(text)
    except ComaskError:
        raise
    except Exception as error:  # each storage has its own kinds
        raise ComaskError(f"{text}: cannot be listed: {one_line(error)}") from error


def _local(text: str) -> Iterator[str]:
    path = os.path.abspath(text)
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            files = ((entry.path, entry.name) for entry in entries if not entry.is_dir())
            yield from _images(text, files, lambda file: kind_of_file(Path(file)))
    elif os.path.exists(path):
        yield path
    else:
        matches = ((os.path.abspath(match), match.name) for match in match_pattern(text))
        yield from _images(text, matches, lambda file: _named(PurePath(file).name))


def _remote(text: str) -> Iterator[str]:
    fs, path = file_system(text)
    if glob.has_magic(path) and not fs.exists(path):
        matches = (str(match) for match in fs.glob(path) if not fs.isdir(match))
        files = ((fs.unstrip_protocol(match), PurePath(match).name) for match in matches)
        yield from _images(text, files, lambda file: _named(PurePath(file).name))
    elif fs.isdir(path):
        names = fs.ls(path, detail=False)
        entries = ((fs.unstrip_protocol(name), PurePath(name).name) for name in names)
        yield from _images(text, entries, lambda file: kind_from_name(PurePath(file).name))
    elif fs.exists(path):
        yield fs.unstrip_protocol(path)
    else:
        raise ComaskError(f"{text}: no such file or folder")


def _named(name: str) -> Kind:
    """What a file is that a pattern names: an image, whatever its suffix, unless comask wrote it."""
    return "result" if kind_from_name(name) == "result" else "image"


def _images(
    text: str, files: Iterable[tuple[str, str]], kind_of: Callable[[str], Kind]
) -> Iterator[str]:
    """Those of an input's files, (address, name), that are images."""
    passed_over, found = PassedOver(), 0
    for address, name in files:
        kind = kind_of(address)
        if kind == "image":
            found += 1
            yield address
        else:
            passed_over.add(kind, name)
    for line in passed_over.lines(text):
        logger.warning("%s", line)
    if not found and glob.has_magic(text):
        raise ComaskError(f"{text}: no such file or folder, and no file matches it")
    if not found:
        raise ComaskError(
            f"{text}: no image lies directly in it; a pattern with /**/ finds those in folders below"
        )


def _listed(file: str) -> Iterator[str]:
    """The addresses in a list."""
    fs, path = file_system(file)
    try:
        kind = fs.info(path)["type"]
    except FileNotFoundError:  # `isfile` takes whatever is in the way for that
        kind = ""
    if kind != "file":
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
