"""Writes files atomically, locks them between processes, reads JSON, and suggests similar names."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Such as a full disk, a folder without write permission, or too many open files.
_FOLDER_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM, errno.ENOENT, errno.ENOTDIR, errno.ESTALE,
}  # fmt: skip

# The errors of file systems without locks: Lustre without `-o flock`, NFS without a lock manager, NFS for
# a folder (which it only locks through a descriptor open for writing), and some FUSE file systems.
_WITHOUT_LOCKS = {
    errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL,
}  # fmt: skip
_POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


def is_folder_fault(error: BaseException) -> bool:
    """Returns whether an error in writing a file would affect all other files of its folder as well."""
    return getattr(error, "errno", None) in _FOLDER_FAULTS


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, and renames it to `path` if the block ends without an error.

    Args:
        path: the file's path; a link's target is replaced, and devices and pipes are written directly.
        durable: whether the file survives a power failure; waiting for the disk takes milliseconds.

    Raises:
        OSError: when the file cannot be written.
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
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Returns the path at which a file is written until it is complete."""
    # A fixed name, so that the file of a killed process is overwritten; each file has one writer.
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Writes `content` to `path` atomically, as `whole_file` does."""
    with whole_file(path, durable=durable) as file:
        file.write(content)


def write_picture(path: Path, pixels: NDArray[Any], kind: str, **options: Any) -> None:
    """Encodes pixels and writes them like `whole_file`, to a picture that can be computed again.

    Args:
        path: the file.
        pixels: [H, W, 3] u8 in RGB, or [H, W] u8 or u16.
        kind: Pillow's name of the format: `jpeg` or `png`.
        options: Pillow's for that format.
    """
    from PIL import Image

    # not durable: waiting for the disk takes as long as a GPU needs for the image
    with whole_file(path, durable=False) as file:
        Image.fromarray(pixels).save(file, format=kind, **options)


@contextlib.contextmanager
def locked(
    path: Path, *, patience: float | None = None, waiting: Callable[[], None] | None = None
) -> Iterator[bool]:
    """Holds the lock of an existing file or folder.

    If the file system has no locks, a warning says so once, and the block runs without a lock.

    Args:
        path: the path of the file or folder.
        patience: seconds to wait for a process that holds the lock; None waits without a limit.
        waiting: called once before waiting.

    Yields:
        Whether the lock is held; False if the file system has no locks.

    Raises:
        BlockingIOError: when another process holds the lock for longer than `patience`.
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
    """Parses JSON.

    Raises:
        ValueError: when the text is not JSON or not UTF-8, or its numbers or nesting exceed Python's
            limits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def did_you_mean(path: Path) -> str:
    """Returns `; did you mean X?` with the most similar name in the folder of `path`, or ""."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""
