"""One process at a time in the folder of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comask.errors import TrainingError

PATIENCE = 20.0  # seconds; loading workers of a killed run notice within five


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which ends with the process, however that ends.

    Raises:
        TrainingError: when another process holds the lock and keeps it.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrainingError(
                        f"{folder}: another process trains there; wait for it, end it, or give "
                        f"another --output"
                    ) from None
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)
