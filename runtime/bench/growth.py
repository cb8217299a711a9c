"""Judges whether a process's memory, threads, files or times grew over a run.

Growth is the difference between the last and the first fifth of the samples after a warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comask.runtime.bench.machine import MIB

Series = NDArray[np.float64]

WARM_UP = 0.2  # share of the run in which allocators, thread pools and caches reach their size
PARTS = 5  # parts of the rest of the run; the first is compared with the last
LEAST = 5  # samples per part that are needed to judge
MEDIAN, LOWER_QUARTILE = 0.5, 0.25


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit of a series' growth.

    Attributes:
        name: the series' name for people.
        unit: the unit of its values.
        allowed: the allowed growth: a share of the first part if `relative`, else in `unit`.
        relative: see `allowed`.
        quantile: the quantile of a part's samples that stands for the part. Other processes can only
            lengthen times, so their lower quartile is nearer to the program's own than their median.
    """

    name: str
    unit: str
    allowed: float
    relative: bool = True
    quantile: float = MEDIAN


# A run that lasts for months must not take more memory, and must keep its speed. Times of one program on
# one machine scatter by several percent anyway, the slowest 1 % of them by more.
LIMITS = {
    "resident_bytes": Limit("resident memory", "MiB", 0.01),
    "gpu_bytes": Limit("GPU memory", "MiB", 0.01),
    "threads": Limit("threads", "", 0, relative=False),
    "files": Limit("open files", "", 0, relative=False),
    "unreadable": Limit("unreadable images per round", "", 0, relative=False),
    "cpu_ms": Limit("CPU time per image", "ms", 0.2, quantile=LOWER_QUARTILE),
    "call_p50_ms": Limit("latency p50", "ms", 0.2, quantile=LOWER_QUARTILE),
    "call_p99_ms": Limit("latency p99", "ms", 0.5, quantile=LOWER_QUARTILE),
    "stream_p50_ms": Limit("stream latency p50", "ms", 0.2, quantile=LOWER_QUARTILE),
    "stream_p99_ms": Limit("stream latency p99", "ms", 0.5, quantile=LOWER_QUARTILE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The growth of a series, with fields in the order in which reports list them.

    Attributes:
        name: the series' name for people.
        unit: the unit in which values are shown; memory is counted in bytes, however.
        relative: whether `grown` and `allowed` are shares of `before`; else they are in `unit`.
        before: level of the first part after the warm-up.
        after: level of the last part.
        grown: the growth from `before` to `after`.
        allowed: the largest `grown` that passes.
        passed: whether `grown` is within that limit.
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
        """The divisor that converts `before` and `after` to `unit`."""
        return MIB if self.unit == "MiB" else 1

    def __str__(self) -> str:
        before, after = self.before / self.scale, self.after / self.scale
        values = f"{before:.4g} to {after:.4g} {self.unit}".rstrip()
        if self.relative:
            return f"{self.name} grew by {self.grown:.1%} ({values}, limit {self.allowed:.0%})"
        return f"{self.name} grew by {self.grown:g} ({values}, limit {self.allowed:g})"


def warmed_up(seconds: Series) -> NDArray[np.bool_]:
    """Returns a mask of the samples after the warm-up."""
    after: NDArray[np.bool_] = seconds > WARM_UP * seconds.max(initial=0)
    return after


def growths(seconds: Series, series: Mapping[str, Series]) -> dict[str, Growth]:
    """Returns the growth of each series that has a limit; empty if the samples are too few.

    Args:
        seconds: [N] f64, the seconds from the start to each sample.
        series: [N] f64 by name; names without a limit in `LIMITS` are left out.
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
