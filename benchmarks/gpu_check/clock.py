"""Measures times on a GPU as medians of CUDA events after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

WARM_UP = 5
FLUSHING = 2**29  # bytes, four times the largest L2 caches


def seconds(call: Callable[[], object], repeats: int, device: str, *, cold: bool = False) -> float:
    """Returns the median time of a call; on CUDA, of the work that it queues on torch's current stream.

    Args:
        call: the function to time.
        repeats: the number of timed calls.
        device: `cuda` or `cpu`.
        cold: whether to overwrite the L2 cache before each call on CUDA.
    """
    import torch

    flush = torch.empty(FLUSHING if cold else 0, dtype=torch.uint8, device=device)
    for _ in range(min(WARM_UP, repeats)):
        call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def wall_seconds(call: Callable[[], object], repeats: int) -> float:
    """Returns the median wall time of a call that returns finished results."""
    for _ in range(min(WARM_UP, repeats)):
        call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
