"""What this process takes at the moment, read from Linux's /proc and the CUDA driver."""

from __future__ import annotations

import os
import re
from pathlib import Path

from comask.errors import ComaskError

STATUS, TASKS, FILES = Path("/proc/self/status"), Path("/proc/self/task"), Path("/proc/self/fd")
SCHEDULE = Path("/proc/thread-self/schedstat")
CPU_FACTS = Path("/proc/cpuinfo")
_RESIDENT = re.compile(r"^VmRSS:\s*(\d+) kB$", re.MULTILINE)
_CLOCK = re.compile(r"^cpu MHz\s*:\s*([\d.]+)$", re.MULTILINE)


def check_vitals() -> None:
    """Whether there is something to read.

    Raises:
        ComaskError: this is not Linux.
    """
    if not STATUS.exists():
        raise ComaskError("memory, threads and files are read from /proc: --soak needs Linux")


def resident_bytes() -> int:
    """Memory of the system that this process holds, shared libraries among it."""
    found = _RESIDENT.search(STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


def thread_count() -> int:
    """Threads, those of libraries too."""
    return len(os.listdir(TASKS))


def open_files() -> int:
    """File descriptors: files, sockets, pipes, devices."""
    return len(os.listdir(FILES)) - 1  # one is of the listing


def waited_seconds() -> float:
    """For how long this thread was ready and others had the processor; 0 where that is not counted."""
    return int(SCHEDULE.read_text().split()[1]) / 1e9 if SCHEDULE.exists() else 0.0


def clock_mhz() -> float | None:
    """Clock of the processor, the mean of its cores; None where the system does not say."""
    clocks = _CLOCK.findall(CPU_FACTS.read_text()) if CPU_FACTS.exists() else []
    return sum(map(float, clocks)) / len(clocks) if clocks else None
