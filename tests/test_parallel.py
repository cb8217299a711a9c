"""`ordered_map`: order, the bound on memory, errors, and an early end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comask import parallel
from comask.parallel import MOST_THREADS, ordered_map


@given(st.lists(st.integers(0, 3), max_size=20))
def test_results_are_in_order_whatever_each_takes(delays: list[int]) -> None:
    def work(item: tuple[int, int]) -> int:
        time.sleep(item[1] / 2000)
        return item[0]

    found = [
        (item[0], future.result()) for item, future in ordered_map(work, list(enumerate(delays)))
    ]
    assert found == [(number, number) for number in range(len(delays))]


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_few_items_are_in_progress_and_several_at_once(
    monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: cores)
    threads = min(cores, parallel.MOST_THREADS)
    together = threading.Barrier(threads)
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 4 * threads + 1):
            assert threading.current_thread() is threading.main_thread()
            yield taken

    def work(item: int) -> int:
        if item <= threads:
            together.wait(10)  # fails unless all threads work at once
        return item

    for item, future in ordered_map(work, items()):
        assert taken - item < threads
        assert future.result() == item


def test_an_error_of_the_items_comes_after_the_results_before_it() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2, 3)
        raise OSError("the list ends here")

    found: list[int] = []
    with pytest.raises(OSError, match="ends here"):
        found.extend(future.result() for _, future in ordered_map(abs, items()))
    assert found == [1, 2, 3]


def test_an_error_of_one_item_is_its_own() -> None:
    futures: list[Future[float]] = [future for _, future in ordered_map(lambda x: 1 / x, [1, 0, 2])]
    assert [future.exception() is None for future in futures] == [True, False, True]


def test_an_early_end_waits_for_no_call_and_its_threads_end_by_themselves() -> None:
    """A call may wait for what only the caller can end, as in a job whose storage does not answer."""
    before, begun, answer = threading.active_count(), threading.Event(), threading.Event()
    called: list[int] = []

    def call(number: int) -> None:
        called.append(number)
        if number:
            begun.set()
            assert answer.wait(60)

    results = ordered_map(call, range(100))
    next(results)
    assert begun.wait(60)
    started = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 30
    answer.set()
    for thread in threading.enumerate():
        if thread.name.startswith("comask"):
            thread.join(60)
    assert threading.active_count() == before
    assert len(called) <= 1 + MOST_THREADS  # what had not begun was dropped
