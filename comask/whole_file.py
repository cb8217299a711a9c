"""Files that are written whole or not at all: a killed process leaves the previous one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when all is well."""
    # No number in the name: what a killed process left is overwritten, and a run has one writer.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Makes `content` the content of `path`."""
    with whole_file(path) as file:
        file.write(content)
