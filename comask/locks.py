"""Locks between processes, which end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# What file systems without locks answer: Lustre without `-o flock`, NFS without a lock manager, NFS for
# a folder (it wants a descriptor that is open for writing), and some of FUSE's.
_WITHOUT_LOCKS = {
    errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL,
}  # fmt: skip
_POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


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
