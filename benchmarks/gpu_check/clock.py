"""Times on a GPU: medians of CUDA events, after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

WARM_UP = 5


def seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """The median time of one call; on CUDA of the work it queues on torch's current stream."""
    import torch

    for _ in range(min(WARM_UP, repeats)):
        call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
