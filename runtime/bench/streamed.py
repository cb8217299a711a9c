"""Frames through `Predictor.stream`: how long one takes alone, and how many pass when slots are full."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from comask.runtime.bench.parts import percentiles
from comask.runtime.future import Future
from comask.runtime.predictor import Predictor
from comask.runtime.stream import StreamSession

from comask.preprocess import Pixels

SLOTS = 3  # batches at work at once, the default of `Predictor.stream`
CAPTURED = 4  # frames of a shape until its CUDA graph is replayed, with a margin


def measure_stream(
    predictor: Predictor, batches: Sequence[Sequence[Pixels]], *, runs: int
) -> dict[str, object]:
    """Frames in host memory to RLE; batches as `full_batches` gives them.

    Returns:
        `milliseconds` of a batch that is alone, as `percentiles`, and `images_per_second` and `slots`
        when as many batches are under way.
    """
    with predictor.stream(slots=SLOTS) as session:
        for batch in batches[:runs]:
            for _ in range(CAPTURED * SLOTS):  # each slot captures its own
                _finish(session.submit(list(batch), rle=True))
        alone = [_alone(session, batches[run % len(batches)]) for run in range(runs)]
        rate = _throughput(session, batches, runs)
    return {"milliseconds": percentiles(alone), "images_per_second": rate, "slots": SLOTS}


def _alone(session: StreamSession, batch: Sequence[Pixels]) -> float:
    started = time.perf_counter()
    _finish(session.submit(list(batch), rle=True))
    return time.perf_counter() - started


def _throughput(session: StreamSession, batches: Sequence[Sequence[Pixels]], runs: int) -> float:
    waiting: deque[Future] = deque()
    images = 0
    started = time.perf_counter()
    for run in range(max(runs, 4 * SLOTS)):  # else filling and draining the slots is most of it
        batch = batches[run % len(batches)]
        if len(waiting) == SLOTS:
            _finish(waiting.popleft())
        waiting.append(session.submit(list(batch), rle=True))
        images += len(batch)
    while waiting:
        _finish(waiting.popleft())
    return images / (time.perf_counter() - started)


def _finish(future: Future) -> None:
    for detections in future.result():
        detections.to_rle()
