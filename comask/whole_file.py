"""Files that are written whole or not at all: a killed process leaves the previous one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# A full disk, a folder that may not be written, too many open files, …
_FOLDER_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM, errno.ENOENT, errno.ENOTDIR, errno.ESTALE,
}  # fmt: skip


def is_folder_fault(error: BaseException) -> bool:
    """Whether an error in writing a file would meet every other file of its folder as well."""
    return getattr(error, "errno", None) in _FOLDER_FAULTS


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when all is well.

    Args:
        path: of the file; a link's target is replaced, and a device or pipe is written to as it is.
        durable: whether it outlives a power failure, too; waiting for the disk takes milliseconds.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    temporary = part_of(path)
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the name that is known
        raise
    finally:
        temporary.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Where a file is written until it is whole."""
    # No number in the name: what a killed process left is overwritten, and a run has one writer.
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Makes `content` the content of `path`; see `whole_file`."""
    with whole_file(path, durable=durable) as file:
        file.write(content)
