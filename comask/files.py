"""Files: written whole or not at all, locked between processes, and read as JSON."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# A full disk, a folder that may not be written, too many open files, …
_FOLDER_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM, errno.ENOENT, errno.ENOTDIR, errno.ESTALE,
}  # fmt: skip

# What file systems without locks answer: Lustre without `-o flock`, NFS without a lock manager, NFS for
# a folder (it wants a descriptor that is open for writing), and some of FUSE's.
_WITHOUT_LOCKS = {
    errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL,
}  # fmt: skip
_POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


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


@contextlib.contextmanager
def locked(
    path: Path, *, patience: float | None = None, waiting: Callable[[], None] | None = None
) -> Iterator[bool]:
    """Holds the lock of a file or folder that is there.

    Where the file system has no locks, a warning says so once, and the block runs without one.

    Args:
        path: of the file or folder.
        patience: seconds to wait for another process that holds it; None waits for as long as it takes.
        waiting: is called once before that.

    Yields:
        Whether the lock is held; False where the file system has none.

    Raises:
        BlockingIOError: when another process holds it for longer than `patience`.
        OSError: when the path cannot be opened.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    deadline = None if patience is None else time.monotonic() + patience
    held = False
    try:
        while not held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if deadline is not None and time.monotonic() > deadline:
                    raise
                if waiting is not None:
                    waiting()
                    waiting = None
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    raise
                _warn(path, error.strerror)
                break
        yield held
    finally:
        os.close(descriptor)


@functools.cache  # a command may lock a folder more than once
def _warn(path: Path, reason: str) -> None:
    logger.warning(
        "warning: %s cannot be locked (%s): its file system has no locks, so make sure that no other "
        "process writes there",
        path, reason,
    )  # fmt: skip


def parse_json(text: str | bytes) -> Any:
    """The value that `text` holds.

    Raises:
        ValueError: it is no JSON, not UTF-8, or holds a number or a nesting that Python refuses.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
