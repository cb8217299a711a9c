"""Order and life of memory that a stream shares with others, on stand-ins for driver and TensorRT."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standin import counts, live, run_on_standin, skip_without_pycuda
from standin_engines import assert_equal, picture
from test_stream import PICTURES, GpuFrame, assert_all_freed, driver, freeze, start

from comask.errors import ComaskError, EngineError, ImageError, KernelError
from comask.runtime.device import open_device
from comask.runtime.dlpack import SharedArray

SMALL = picture(64, 64, 1)  # of another canvas
LARGE = picture(150, 200, 3)  # of the same


def queue_read(shared: SharedArray, stream: int) -> np.ndarray:
    """What a consumer's stream copies to the host once it gets there."""
    read = np.zeros(shared.shape, shared.dtype)
    status = driver().cuMemcpyDtoHAsync_v2(
        ctypes.c_void_p(read.ctypes.data), ctypes.c_void_p(shared.address),
        ctypes.c_size_t(read.nbytes), ctypes.c_void_p(stream),
    )  # fmt: skip
    assert status == 0
    return read


def slots(predictor: Any) -> int:
    return len(predictor.stages.pool._all)


def readers_come_before_the_next_batch(folder: str) -> None:
    predictor, expected = start(folder)
    device = open_device()
    with device:
        consumer, three = device.stream(), predictor([LARGE] * 3)
        for when_full in ("block", "drop_oldest"):
            for how in ("dlpack", "wait_on", "wait_on when done"):
                with predictor.stream(slots=1, when_full=when_full) as session:
                    future = session.submit(PICTURES[0], rle=True)
                    scores, bitmaps = future.outputs["scores"], future.bitmaps()
                    if how == "dlpack":
                        scores.__dlpack__(stream=consumer.handle)
                        bitmaps.__dlpack__(stream=consumer.handle)
                    else:
                        if how == "wait_on when done":
                            future.result()
                        future.wait_on(consumer.handle)
                    seen = queue_read(scores, consumer.handle)
                    masks = queue_read(bitmaps, consumer.handle)
                    # these need more memory for everything, and overwrite it
                    larger = session.submit([LARGE] * 3, rle=True)
                    assert_equal(larger.result()[2], three[2])
                    larger.bitmaps()
                    consumer.synchronize()
                    np.testing.assert_array_equal(
                        seen[0, : len(expected[0])], expected[0].scores, f"{when_full}, {how}"
                    )
                    np.testing.assert_array_equal(masks[: len(expected[0])], expected[0].masks)
        with predictor.stream(slots=1) as session:
            session.submit(PICTURES[0]).result()
            bitmaps = session.submit(PICTURES[0]).bitmaps()
            bitmaps.__dlpack__(stream=consumer.handle)
            masks = queue_read(bitmaps, consumer.handle)
            future = session.submit(LARGE)
            future.bitmaps()  # alone needs more memory
            consumer.synchronize()
            np.testing.assert_array_equal(masks[: len(expected[0])], expected[0].masks)
        consumer.close()
    del scores, bitmaps, future, larger
    predictor.close()
    assert_all_freed()


def host_frames_written_on_a_stream(folder: str) -> None:
    predictor, expected = start(folder)
    device = open_device()
    with device:
        theirs, gpu = device.stream(), GpuFrame(PICTURES[0])
        for explicit in (True, False):
            pinned = device.pinned(PICTURES[0].nbytes)
            frame = pinned.bytes.reshape(PICTURES[0].shape)
            theirs.copy_out(frame, gpu.memory)  # waits in the stream
            with predictor.stream(None if explicit else theirs.handle) as session:
                future = session.submit(frame, stream=theirs.handle if explicit else None)
                assert_equal(future.result(), expected[0])
            del frame
            pinned.free()
        theirs.close()
    del gpu
    predictor.close()
    assert_all_freed()


def frames_are_written_again_once_read(folder: str) -> None:
    predictor, expected = start(folder)
    device = open_device()
    with device:
        decoder, frame = device.stream(), GpuFrame(PICTURES[0])
        with predictor.stream(slots=1) as session:
            freeze(True)
            future = session.submit(frame, stream=decoder.handle)
            future.wait_read(decoder.handle)
            decoder.copy_in(frame.memory, PICTURES[1])
            decoder.synchronize()
            assert not future.done()  # read, and no more
            freeze(False)
            assert_equal(future.result(), expected[0])
            future.wait_read(decoder.handle)  # nothing left to wait for
            assert_equal(session.submit(frame).result(), expected[1])
            future.wait_read(decoder.handle)
            future.wait_on(decoder.handle)
        decoder.close()
    del frame
    predictor.close()
    assert_all_freed()


def what_is_wrong_with_a_frame_is_said(folder: str) -> None:
    predictor, _ = start(folder)
    frame = GpuFrame(PICTURES[0])
    ordinal = ctypes.c_int.in_dll(driver(), "standin_ordinal")
    with predictor.stream() as session:
        for source in (frame, PICTURES[0]):
            with pytest.raises(EngineError, match=r"CUDA stream 0xbad .*still exists"):
                session.submit(source, stream=0xBAD)
        future = session.submit(frame)
        with pytest.raises(EngineError, match=r"CUDA stream 0xbad "):
            future.wait_on(0xBAD)
        ordinal.value = 1  # all memory lies on another GPU, as the driver says
        with pytest.raises(ImageError, match="a frame is on GPU 1, this predictor on GPU 0"):
            session.submit(frame)
        ordinal.value = 0
        future.result()
    del frame
    predictor.close()
    assert_all_freed()


def waits_are_for_a_batch(folder: str) -> None:
    """Whose lane may run another one by then."""
    predictor, expected = start(folder)
    with predictor.stream(slots=1) as session:
        first = session.submit(PICTURES[0])
        batch, lane = first._batch, first._batch.lane
        assert lane is not None
        second = session.submit(PICTURES[1])
        freeze(True)
        for seconds in (0.0, None):
            assert lane.wait(batch, seconds)
            assert not second.done()
        freeze(False)
        assert_equal(first.result(), expected[0])
        assert_equal(second.result(), expected[1])
    predictor.close()
    assert_all_freed()


def sessions_that_fail_or_are_forgotten(folder: str) -> None:
    from comask.runtime.trt import context_pool, lane

    predictor, _ = start(folder)
    predictor(PICTURES[0])
    before, few = live(), slots(predictor)

    lend, made = context_pool.ContextPool.lend, []

    def failing(pool: Any, make: Any) -> Any:
        made.append(True)
        if len(made) == 3:
            raise EngineError("no memory for another context")
        return lend(pool, make)

    context_pool.ContextPool.lend = failing  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="another context"):
        predictor.stream(slots=3)
    context_pool.ContextPool.lend = lend  # type: ignore[method-assign]

    class Failing(lane.LaneMasks):
        def __init__(self, *_: Any) -> None:
            raise KernelError("no kernel")

    masks, lane.LaneMasks = lane.LaneMasks, Failing  # type: ignore[misc]
    with pytest.raises(KernelError, match="no kernel"):
        predictor.stream()
    lane.LaneMasks = masks  # type: ignore[misc]
    with pytest.raises(ComaskError, match="when_full"):
        predictor.stream(when_full="drop")  # type: ignore[arg-type]
    gc.collect()
    assert (live(), slots(predictor)) == (before, few)

    session = predictor.stream(slots=2)
    for _ in range(3):
        future = session.submit(PICTURES[0], rle=True)
        bitmaps = future.bitmaps()
        future.result()
    outputs = future.outputs
    frame = GpuFrame(PICTURES[0])
    session.submit(frame)  # and nobody waits for it
    del session, future, frame
    gc.collect()
    predictor.close()
    for borrowed in (bitmaps, outputs["scores"]):
        with pytest.raises(RuntimeError, match="their session is closed"):
            borrowed.copy()
    assert_all_freed()


def a_backend_closed_before_its_session(folder: str) -> None:
    predictor, expected = start(folder)
    session = predictor.stream(slots=2)
    kept = session.submit(PICTURES[0])
    assert_equal(kept.result(), expected[0])
    late = session.submit(PICTURES[1])
    predictor.stages.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="this backend is closed"):
            session.submit(PICTURES[0])
        with pytest.raises(RuntimeError, match="this backend is closed"):
            late.result()
        session.close()
        with pytest.raises(RuntimeError, match="this session is closed"):
            session.submit(PICTURES[0])
        session._closed = False
    session._closed = True
    assert_equal(kept.result(), expected[0])
    predictor.close()
    assert_all_freed()


def graphs_of_other_shapes(folder: str) -> None:
    predictor, expected = start(folder)
    with predictor.stream(slots=1) as session:
        for _ in range(3):
            session.submit(PICTURES[0]).result()
        assert counts().graph_launches == 2
        os.environ["STANDIN_MEMORY"] = str(counts().device_bytes + 4096)
        with pytest.raises(EngineError, match=r"cannot allocate .* MiB more"):
            session.submit([PICTURES[0]] * 3)
        del os.environ["STANDIN_MEMORY"]
        # contexts have been told of three frames: no graph of earlier ones may run any more
        assert_equal(session.submit(PICTURES[0]).result(), expected[0])
        assert counts().graph_launches == 2
        assert live().get("graphs_live", 0) == 0
    small = predictor(SMALL)
    before = counts().graph_launches
    with predictor.stream(slots=2) as session:  # each slot keeps to its canvas
        for _ in range(10):
            for image, detections in [
                (PICTURES[0], expected[0]),
                (PICTURES[1], expected[1]),
                (SMALL, small),
            ]:
                assert_equal(session.submit(image).result(), detections)
    assert counts().graph_launches - before == 28
    predictor.close()
    assert_all_freed()


def page_locked_for_host_frames_alone(folder: str) -> None:
    predictor, expected = start(folder)
    frame = GpuFrame(PICTURES[0])
    with predictor.stream(slots=1) as session:
        staging = session._idle[0]._staging  # type: ignore[attr-defined]
        assert_equal(session.submit(frame).result(), expected[0])
        assert "images" not in staging
        assert_equal(session.submit(PICTURES[0]).result(), expected[0])
        assert staging["images"].bytes.size == PICTURES[0].nbytes
        both = session.submit([frame, PICTURES[1]]).result()
        assert_equal(both[1], predictor(PICTURES[:2])[1])
    del frame
    predictor.close()
    assert_all_freed()


def a_timed_run_that_fails(folder: str) -> None:
    from comask.runtime.trt.contexts import Contexts

    predictor, _ = start(folder)
    predictor(PICTURES[0])
    before = live()

    def fail(*_: Any) -> None:
        raise EngineError("it does not start")

    enqueue, Contexts.enqueue = Contexts.enqueue, fail  # type: ignore[method-assign,assignment]
    sizes = np.array([[96, 128]], np.int32)
    with pytest.raises(EngineError, match="does not start"):
        predictor.stages.run(PICTURES[0][None], sizes, seconds={})
    Contexts.enqueue = enqueue  # type: ignore[method-assign]
    assert live() == before
    predictor.close()
    assert_all_freed()


@pytest.mark.parametrize(
    "function",
    [readers_come_before_the_next_batch, host_frames_written_on_a_stream,
     frames_are_written_again_once_read, what_is_wrong_with_a_frame_is_said, waits_are_for_a_batch,
     sessions_that_fail_or_are_forgotten, a_backend_closed_before_its_session,
     graphs_of_other_shapes, page_locked_for_host_frames_alone, a_timed_run_that_fails],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_on_the_standins(function: Any, micro_bundle: Path, tmp_path: Path) -> None:
    skip_without_pycuda()
    run_on_standin(function, shutil.copytree(micro_bundle, tmp_path / "bundle"))
