"""Calls a function in several threads, on few items at a time, with the results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Decoding, resizing, drawing and encoding release Python's lock most of the time. More threads bring
# little, and each holds one more image in memory.
MOST_THREADS = 4


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Future[Result]]]:
    """Calls `function` on each item in other threads, while the caller uses earlier results.

    Items are taken in the caller's thread. At most `MOST_THREADS` results are in progress or wait for
    the caller, so that memory is bounded. If the caller stops early, calls that have begun end by
    themselves, since they may wait for something that only the caller can end.

    Args:
        function: called by several threads at once.
        items: an error with which they end is raised after the results of the items before it.

    Yields:
        each item, in order, and the future of its result, which may still be in progress.
    """
    threads = min(cores(), MOST_THREADS)
    coming: deque[tuple[Item, Future[Result]]] = deque()
    failure: Exception | None = None
    pool, finished = ThreadPoolExecutor(threads, "comask"), False
    try:
        iterator = iter(items)
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            coming.append((item, pool.submit(function, item)))
            if len(coming) == threads:
                yield coming.popleft()
        while coming:
            yield coming.popleft()
        finished = True
    finally:
        pool.shutdown(wait=finished, cancel_futures=True)
    if failure:
        raise failure
