"""What a `StreamSession` does when it is full, late, failing or asked for nonsense, on fake backends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from comask.config import PreprocessConfig
from comask.errors import ConfigError, EngineError, FrameDroppedError, ImageError, QueueFullError
from comask.runtime import Predictor
from comask.runtime.backends.base import Stages
from comask.runtime.frames import Coding, borrow_frame
from comask.runtime.lanes import Batch, HostLanes
from comask.runtime.stream import StreamSession

FRAME = np.zeros((64, 64, 3), np.uint8)
OUTPUTS: dict[str, Any] = {
    "num_detections": np.zeros(1, np.int32),
    "boxes": np.zeros((1, 0, 4), np.float32),
    "scores": np.zeros((1, 0), np.float32),
    "labels": np.zeros((1, 0), np.int32),
    "masks": np.zeros((1, 0, 28, 28), np.float32),
}
SOON = 5.0  # seconds within which what waits for nothing has happened


class GatedStages(Stages):
    """A backend on the host that comes to an end when `gate` opens, or fails with `gate.error`."""

    gate: Any

    def run(self, images: Any, image_sizes: Any, *, seconds: Any = None) -> dict[str, Any]:
        assert self.gate.opened.wait(60)
        if self.gate.error is not None:
            raise self.gate.error
        return OUTPUTS


@contextmanager
def gated(**options: Any) -> Iterator[tuple[StreamSession, Any]]:
    gate = SimpleNamespace(opened=threading.Event(), error=None)
    stages: Any = type("Stages", (GatedStages,), {"gate": gate})("gated", None, None)
    predictor = Predictor(stages, PreprocessConfig(short_side=64, max_side=96))
    try:
        with predictor.stream(**options) as session:
            try:
                yield session, gate
            finally:
                gate.opened.set()
    finally:
        gate.opened.set()


def test_a_full_session_on_the_host_raises_at_once() -> None:
    for options in ({"when_full": "raise"}, {"timeout": 0.01}):
        with gated(slots=2, **options) as (session, gate):
            futures = [session.submit(FRAME) for _ in range(2)]
            with pytest.raises(QueueFullError, match="all 2 slots"):
                session.submit(FRAME)
            assert not futures[0].done()
            with pytest.raises(TimeoutError):
                futures[0].result(0.01)
            gate.opened.set()
            assert [len(future.result(SOON)) for future in futures] == [0, 0]
            assert len(session.submit(FRAME).result(SOON)) == 0


def test_the_oldest_frame_on_the_host_is_dropped() -> None:
    with gated(when_full="drop_oldest", slots=1) as (session, gate):
        first, dropped, last = (session.submit(FRAME) for _ in range(3))
        with pytest.raises(FrameDroppedError):
            dropped.result()
        for wait in (last.wait_on, last.wait_read):
            with pytest.raises(RuntimeError, match="waits for a slot"):
                wait(5)
        gate.opened.set()
        assert len(first.result(SOON)) == len(last.result(SOON)) == 0


def test_outputs_on_the_host_wait_and_other_threads_do_not() -> None:
    with gated() as (session, gate):
        future = session.submit(FRAME)
        future.wait_read(5)  # read by now
        seen: list[Any] = []

        def consume() -> None:
            seen.append(future.outputs["scores"].shape)
            future.wait_on(5)
            seen.append(future.bitmaps().shape)

        consumer = threading.Thread(target=consume)
        consumer.start()
        time.sleep(0.02)
        started = time.monotonic()
        assert not future.done()
        assert time.monotonic() - started < SOON
        assert seen == []
        gate.opened.set()
        consumer.join()
        assert seen == [(1, 0), (0, 64, 64)]


def test_what_the_backend_raises_is_the_results() -> None:
    with gated() as (session, gate):
        gate.error = EngineError("it broke")
        future = session.submit(FRAME)
        gate.opened.set()
        for _ in range(2):
            with pytest.raises(EngineError, match="it broke"):
                future.result(SOON)
        gate.error = None
        assert len(session.submit(FRAME).result(SOON)) == 0


def test_streams_are_refused_on_the_host() -> None:
    with (
        gated() as (session, _),
        pytest.raises(ImageError, match=r"stream 0x5, and gated cannot wait"),
    ):
        session.submit(FRAME, stream=5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"when_full": "drop"}, "when_full='drop'; expected one of block"),
        ({"timeout": 1, "when_full": "raise"}, "timeout=1 with when_full='raise'"),
        ({"timeout": -1}, "timeout=-1"),
        ({"slots": 0}, "slots: expected a whole number from 1 on, got 0"),
        ({"slots": -1}, "slots: expected a whole number from 1 on, got -1"),
    ],
)
def test_options_are_compared_before_slots_are_taken(options: Any, words: str) -> None:
    class NoLanes(Stages):
        def lanes(self, count: int, *, graphs: bool) -> Any:
            raise AssertionError("slots were taken")

    predictor = Predictor(NoLanes("", None, None), PreprocessConfig())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words):
        predictor.stream(**options)


@pytest.mark.parametrize("max_batch", [0, -1])
def test_a_batch_of_none_is_refused(max_batch: int) -> None:
    with pytest.raises(ConfigError, match=f"max_batch: expected .*, got {max_batch}"):
        Predictor(Stages("", None, None), PreprocessConfig(), max_batch=max_batch)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"max_batch: expected .*, got {max_batch}"):
        Predictor.load("no bundle", max_batch=max_batch)


class FakeLane:
    """As a GPU's: batches end when their event says so, which the next batch takes over."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.batch: Batch | None = None
        self.error: Exception | None = None

    def suits(self, batch: Batch) -> bool:
        return True

    def start(self, batch: Batch) -> None:
        self.batch = batch
        self.event.clear()

    def wait(self, batch: Batch, seconds: float | None) -> bool:
        end = time.monotonic() + (60 if seconds is None else seconds)
        while not (done := self.batch is not batch or self.done()) and time.monotonic() < end:
            time.sleep(0.0005)
        return done

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.event.is_set()

    def release_read(self) -> None: ...

    def fetch(self, batch: Batch) -> Any:
        return OUTPUTS, None


class FakeLanes(HostLanes):
    def __init__(self, count: int) -> None:
        self.lanes: Any = [FakeLane() for _ in range(count)]
        self.closed = 0

    def borrow(self, source: Any, stream: Any, coding: Coding) -> Any:
        return borrow_frame(source, -1, coding)

    def close(self) -> None:
        self.closed += 1


class FakeStages(Stages):
    made: Any
    closed: Any

    def lanes(self, count: int, *, graphs: bool) -> Any:
        self.made.append(FakeLanes(count))
        return self.made[-1]

    def close(self) -> None:
        self.closed.append(True)


def fake_predictor() -> Predictor:
    stages: Any = type("Stages", (FakeStages,), {"made": [], "closed": []})("fake", None, None)
    return Predictor(stages, PreprocessConfig(short_side=64, max_side=96))


def test_a_result_is_found_though_its_lane_runs_another_frame() -> None:
    predictor = fake_predictor()
    session = predictor.stream(slots=1)
    lane = predictor.stages.made[0].lanes[0]  # type: ignore[attr-defined]
    future = session.submit(FRAME)
    outcome: list[Any] = []

    def wait() -> None:
        started = time.monotonic()
        try:
            outcome.append(len(future.result(30)))
        except TimeoutError as error:
            outcome.append(error)
        outcome.append(time.monotonic() - started)

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not session._waiters:
        time.sleep(0.001)
    with session._changed:  # nobody looks in between
        lane.event.set()
        session._start(other := batch_of(session), session._free_lane(other))
    waiter.join()
    assert outcome[0] == 0
    assert outcome[1] < 10  # though the other frame never ended
    lane.event.set()
    session.close()


def batch_of(session: StreamSession) -> Batch:
    frame = session._lanes.borrow(FRAME, None, Coding("rgb", "bt709", False))
    predictor = session.predictor
    return Batch((frame,), predictor.preprocess, predictor.mask_threshold, False)


def test_a_result_that_comes_with_the_last_second_is_no_timeout() -> None:
    predictor = fake_predictor()
    with predictor.stream(slots=1) as session:
        lane = predictor.stages.made[0].lanes[0]  # type: ignore[attr-defined]
        future = session.submit(FRAME)
        wait = lane.wait

        def too_late(batch: Batch, seconds: float | None) -> bool:
            found = wait(batch, seconds)
            if seconds:
                lane.event.set()
            return bool(found)

        lane.wait = too_late
        assert len(future.result(0.01)) == 0


def test_a_gpu_that_fails_stops_no_closing() -> None:
    predictor = fake_predictor()
    sessions = [predictor.stream(slots=2) for _ in range(2)]
    futures = [session.submit(FRAME) for session in sessions]
    made, closed = predictor.stages.made, predictor.stages.closed  # type: ignore[attr-defined]
    for lanes in made:
        for lane in lanes.lanes:
            lane.error = EngineError("the GPU failed")
    made[1].close = lambda: (_ for _ in ()).throw(EngineError("cannot be freed"))
    with pytest.raises(EngineError, match="cannot be freed"):
        predictor.close()
    assert made[0].closed == 1
    assert closed == [True]
    for future in futures:
        with pytest.raises(EngineError, match="the GPU failed"):
            future.result(SOON)
