"""Measures times on a GPU by CUDA events around queued work, so that Python's time is not measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

WARM_UP = 5
QUEUED = 20  # calls between two events: the GPU is busy while Python queues the next ones


def seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Returns the median time of a call's work on the GPU; on a CPU, that of the call.

    On CUDA, `QUEUED` calls are captured as a graph, which is replayed between two events. Work that
    cannot be captured is queued between them instead; then the time is Python's if that is longer.

    Args:
        call: queues work on torch's current stream, without waiting for it.
        repeats: the number of timed calls.
        device: `cuda` or `cpu`.
    """
    if device != "cuda":
        return wall_seconds(call, repeats)
    import torch

    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(QUEUED):
                call()
        queue = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()

        def queue() -> None:
            for _ in range(QUEUED):
                call()

    return event_seconds(queue, max(3, repeats // QUEUED)) / QUEUED


def event_seconds(queue: Callable[[], object], repeats: int) -> float:
    """Returns the median time between two events around the work that `queue` queues."""
    import torch

    queue()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        queue()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
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
