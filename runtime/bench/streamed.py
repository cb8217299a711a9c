"""Frames through `Predictor.stream`: how long one takes alone, and how many pass when slots are full."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import cycle, islice

from comask.preprocess import Pixels
from comask.runtime.bench.parts import canvas_of, percentiles
from comask.runtime.predictor import Predictor
from comask.runtime.stream import SLOTS, Future, StreamSession

CAPTURED = 4  # batches of a shape in a slot until its CUDA graph is replayed, with a margin


def measure_stream(
    predictor: Predictor, batches: Sequence[Sequence[Pixels]], *, runs: int
) -> dict[str, object]:
    """Frames in host memory to RLE; batches as `full_batches` gives them.

    One canvas is measured after the other: a slot's graph is of the last canvas it ran, and a camera has
    but one.

    Returns:
        `milliseconds` of a batch that is alone, as `percentiles`, and `images_per_second` and `slots`
        when as many batches are under way.
    """
    by_canvas: dict[tuple[int, int], list[Sequence[Pixels]]] = {}
    for batch in islice(cycle(batches), runs):
        by_canvas.setdefault(canvas_of(batch[0], predictor.preprocess), []).append(batch)
    alone: list[float] = []
    seconds = 0.0
    for same in by_canvas.values():
        with predictor.stream(slots=SLOTS) as session:
            fill_slots(session, same[0], CAPTURED)
            alone += [_alone(session, batch) for batch in same]
            seconds += _overlapped(session, same)
    rate = sum(map(len, islice(cycle(batches), runs))) / seconds
    return {"milliseconds": percentiles(alone), "images_per_second": rate, "slots": SLOTS}


def fill_slots(session: StreamSession, batch: Sequence[Pixels], times: int) -> None:
    """Runs a batch in every slot of a session of `SLOTS`: each grows and captures for itself."""
    for _ in range(times):
        for future in [session.submit(list(batch), rle=True) for _ in range(SLOTS)]:
            _finish(future)


def _alone(session: StreamSession, batch: Sequence[Pixels]) -> float:
    started = time.perf_counter()
    _finish(session.submit(list(batch), rle=True))
    return time.perf_counter() - started


def _overlapped(session: StreamSession, batches: Sequence[Sequence[Pixels]]) -> float:
    """Seconds that `batches` take while all slots are at work."""
    runs = max(len(batches), 4 * SLOTS)  # else filling and draining the slots is most of it
    waiting: deque[Future] = deque()
    started = time.perf_counter()
    for batch in islice(cycle(batches), runs):
        if len(waiting) == SLOTS:
            _finish(waiting.popleft())
        waiting.append(session.submit(list(batch), rle=True))
    while waiting:
        _finish(waiting.popleft())
    return (time.perf_counter() - started) * len(batches) / runs


def _finish(future: Future) -> None:
    for detections in future.result():
        detections.to_rle()
