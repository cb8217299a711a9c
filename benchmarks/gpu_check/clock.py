"""Times on a GPU: medians of CUDA events, after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

WARM_UP = 5
FLUSHING = 2**29  # bytes; the largest L2 caches have a quarter of it


def seconds(call: Callable[[], object], repeats: int, device: str, *, cold: bool = False) -> float:
    """The median time of one call; on CUDA of the work it queues on torch's current stream.

    Args:
        call: to time.
        repeats: of it.
        device: `cuda` or `cpu`.
        cold: on CUDA, whether the L2 cache is overwritten before each call.
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
    """The median wall time of a call that returns finished results."""
    for _ in range(min(WARM_UP, repeats)):
        call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
