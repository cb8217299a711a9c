"""Whether what a process takes grew over a run.

Growth is the last fifth of the samples against the first, after a warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comask.runtime.bench.machine import MIB

Series = NDArray[np.float64]

WARM_UP = 0.2  # of the run: allocators, thread pools and caches take what they need, then keep it
PARTS = 5  # of what follows; the first is compared with the last
LEAST = 5  # samples a part, or nothing is judged
MEDIAN, LOWER_QUARTILE = 0.5, 0.25


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What a series did, in the order in which reports list it.

    Attributes:
        name: of the series, for people.
        unit: of its values; memory is counted in bytes, though, and `unit` is how it is shown.
        relative: whether `grown` and `allowed` are shares of `before`, else they are in `unit`.
        before: level of the first part after the warm-up.
        after: level of the last part.
        grown: from the one to the other.
        allowed: the most that `grown` may be.
        passed: whether it is within that limit.
    """

    name: str
    unit: str
    relative: bool
    before: float
    after: float
    grown: float
    allowed: float
    passed: bool

    @property
    def scale(self) -> int:
        """What `before` and `after` are divided by to be in `unit`."""
        return MIB if self.unit == "MiB" else 1

    def __str__(self) -> str:
        before, after = self.before / self.scale, self.after / self.scale
        values = f"{before:.4g} to {after:.4g} {self.unit}".rstrip()
        if self.relative:
            return f"{self.name} grew by {self.grown:.1%} ({values}, limit {self.allowed:.0%})"
        return f"{self.name} grew by {self.grown:g} ({values}, limit {self.allowed:g})"


def warmed_up(seconds: Series) -> NDArray[np.bool_]:
    """Which samples lie behind the warm-up."""
    behind: NDArray[np.bool_] = seconds > WARM_UP * seconds.max(initial=0)
    return behind


def growths(seconds: Series, series: Mapping[str, Series]) -> dict[str, Growth]:
    """What each series that has a limit did; empty where there are too few samples to say.

    Args:
        seconds: [N] f64, since the start, of each sample.
        series: by name, [N] f64 each; names that `LIMITS` lacks are left out.
    """
    warm = warmed_up(seconds)
    size = int(np.count_nonzero(warm)) // PARTS
    if size < LEAST:
        return {}
    return {
        name: _growth(LIMITS[name], values[warm][:size], values[warm][-size:])
        for name, values in series.items()
        if name in LIMITS
    }


def _growth(limit: Limit, first: Series, last: Series) -> Growth:
    before, after = (float(np.quantile(part, limit.quantile)) for part in (first, last))
    grown = after - before
    if limit.relative and grown:
        grown = grown / before if before else float("inf")
    return Growth(
        name=limit.name, unit=limit.unit, relative=limit.relative, before=before, after=after,
        grown=grown, allowed=limit.allowed, passed=grown <= limit.allowed,
    )  # fmt: skip
