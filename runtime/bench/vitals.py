"""What this process takes at the moment, and whether it grew over a run.

Read from /proc of Linux and from the CUDA driver. Growth is the last fifth of the samples against the
first, after a warm-up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comask.errors import ComaskError

STATUS, TASKS, FILES = Path("/proc/self/status"), Path("/proc/self/task"), Path("/proc/self/fd")
SCHEDULE = Path("/proc/thread-self/schedstat")
CPU_FACTS = Path("/proc/cpuinfo")
_RESIDENT = re.compile(r"^VmRSS:\s*(\d+) kB$", re.MULTILINE)
_CLOCK = re.compile(r"^cpu MHz\s*:\s*([\d.]+)$", re.MULTILINE)

Series = NDArray[np.float64]

WARM_UP = 0.2  # of the run: allocators, thread pools and caches take what they need, then keep it
PARTS = 5  # of what follows; the first is compared with the last
LEAST = 5  # samples a part, or nothing is judged
MEDIAN, LOWER_QUARTILE = 0.5, 0.25

MIB = 2**20


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


@dataclass(frozen=True, slots=True)
class Limit:
    """How far a series may grow.

    Attributes:
        name: what it is, for people.
        unit: of its values.
        allowed: growth; a share of the first part where `relative`, else in `unit`.
        relative: see `allowed`.
        quantile: of a part's samples that stands for the part. Other processes only ever add to times,
            so the lower quartile of these is nearer to the program's own than their median.
    """

    name: str
    unit: str
    allowed: float
    relative: bool = True
    quantile: float = MEDIAN


# What a run may do that lasts for months: take no more, and keep its speed. Times of one program on one
# machine stray by several percent by themselves, the slowest 1 % of them by more.
LIMITS = {
    "resident_bytes": Limit("resident memory", "MiB", 0.01),
    "gpu_bytes": Limit("GPU memory", "MiB", 0.01),
    "threads": Limit("threads", "", 0, relative=False),
    "files": Limit("open files", "", 0, relative=False),
    "unreadable": Limit("unreadable images a round", "", 0, relative=False),
    "cpu_ms": Limit("CPU time an image", "ms", 0.2, quantile=LOWER_QUARTILE),
    "call_p50_ms": Limit("latency p50", "ms", 0.2, quantile=LOWER_QUARTILE),
    "call_p99_ms": Limit("latency p99", "ms", 0.5, quantile=LOWER_QUARTILE),
    "stream_p50_ms": Limit("stream latency p50", "ms", 0.2, quantile=LOWER_QUARTILE),
    "stream_p99_ms": Limit("stream latency p99", "ms", 0.5, quantile=LOWER_QUARTILE),
}


@dataclass(frozen=True, slots=True)
class Growth:
    """What a series did.

    Attributes:
        before: the first part after the warm-up.
        after: the last part.
        limit: see `Limit`.
    """

    before: float
    after: float
    limit: Limit

    @property
    def grown(self) -> float:
        """As `Limit.allowed` is."""
        difference = self.after - self.before
        if not self.limit.relative or not difference:
            return difference
        return difference / self.before if self.before else float("inf")

    @property
    def passed(self) -> bool:
        """Whether it is within its limit."""
        return self.grown <= self.limit.allowed

    def __str__(self) -> str:
        limit, scale = self.limit, MIB if self.limit.unit == "MiB" else 1
        unit = f" {limit.unit}" if limit.unit else ""
        values = f"{self.before / scale:.4g} to {self.after / scale:.4g}{unit}"
        if limit.relative:
            return f"{limit.name} grew by {self.grown:.1%} ({values}, limit {limit.allowed:.0%})"
        return f"{limit.name} grew by {self.grown:g} ({values}, limit {limit.allowed:g})"


def warmed_up(seconds: Series) -> NDArray[np.bool_]:
    """Which samples lie behind the warm-up."""
    behind: NDArray[np.bool_] = seconds > WARM_UP * seconds.max(initial=0)
    return behind


def growths(seconds: Series, series: Mapping[str, Series]) -> dict[str, Growth]:
    """What each series did; empty where there are too few samples to say.

    Args:
        seconds: [N] f64, since the start, of each sample.
        series: by the names of `LIMITS`, [N] f64 each.
    """
    warm = warmed_up(seconds)
    size = int(np.count_nonzero(warm)) // PARTS
    if size < LEAST:
        return {}
    found = {}
    for name, values in series.items():
        limit, kept = LIMITS[name], values[warm]
        before, after = (float(np.quantile(p, limit.quantile)) for p in (kept[:size], kept[-size:]))
        found[name] = Growth(before, after, limit)
    return found
