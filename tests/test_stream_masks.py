"""Masks of a stream where its outputs are: bitmaps and RLEs, equal to `Detections`' and pycocotools'."""

from __future__ import annotations

import ctypes
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from standin import counts, run_on_standin, skip_without_pycuda
from standin_engines import picture
from test_stream import GpuFrame, assert_all_freed, freeze, start

from comask.errors import FrameDroppedError
from comask.runtime import Predictor
from comask.runtime.dlpack import SharedArray
from comask.runtime.stream import StreamSession
from comask.structures import Detections

# of one canvas, and of sizes that a resize to it scales by factors of their own
SIZES = [(96, 128), (77, 103), (48, 64), (150, 200)]
PICTURES = [picture(*size, seed) for seed, size in enumerate(SIZES)]


def pycocotools_rles(masks: np.ndarray) -> list[dict[str, Any]]:
    encoded = [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    return [rle | {"counts": rle["counts"].decode()} for rle in encoded]


def assert_rles(found: Detections) -> None:
    """That they came with the result, and are what both others make of the same masks."""
    assert found.has_rles
    assert found.to_rle() == pycocotools_rles(found.masks)
    assert [result["segmentation"] for result in found.to_coco(1)] == found.to_rle()


def assert_bitmaps(bitmaps: np.ndarray, found: Detections) -> None:
    assert bitmaps.dtype == np.uint8
    assert len(bitmaps) >= len(found) > 0
    np.testing.assert_array_equal(bitmaps[: len(found)], found.masks)
    assert not bitmaps[len(found) :].any()


def test_on_the_host(micro_bundle: Path) -> None:
    with Predictor.load(micro_bundle, "onnxruntime") as predictor, predictor.stream() as session:
        plain, future = session.submit(PICTURES[1]), session.submit(PICTURES[1], rle=True)
        assert not plain.result().has_rles
        assert plain.result().to_rle() == future.result().to_rle()
        assert_rles(future.result())
        assert_bitmaps(torch.from_dlpack(future.bitmaps()).numpy(), future.result())
        with pytest.raises(IndexError, match="no frame 1 in a batch of 1"):
            future.bitmaps(1)
        some = future.result()[::2]
        assert some.to_rle() == future.result().to_rle()[::2]
        assert_rles(some)


# On the stand-ins.


def on_host(shared: SharedArray) -> np.ndarray:
    """What a consumer sees that waits as the interface tells it."""
    interface = shared.__cuda_array_interface__
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuStreamSynchronize(ctypes.c_void_p(interface["stream"])) == 0
    array = np.zeros(interface["shape"], interface["typestr"])
    ctypes.memmove(array.ctypes.data, interface["data"][0], array.nbytes)
    return array


def read(session: StreamSession, shared: SharedArray) -> np.ndarray:
    with session.predictor.stages.pool.device:  # type: ignore[attr-defined]
        return on_host(shared)


def bitmaps_and_rles(folder: str) -> None:
    predictor, _ = start(folder)
    alone = [predictor(image) for image in PICTURES]
    frames = [GpuFrame(image) for image in PICTURES]
    with predictor.stream(slots=2) as session:
        for _ in range(3):  # eager, captured, replayed
            for image, frame, expected in zip(PICTURES, frames, alone, strict=True):
                future = session.submit(frame, rle=True)
                bitmaps = future.bitmaps()
                assert bitmaps.shape[1:] == image.shape[:2]
                assert_bitmaps(read(session, bitmaps), expected)
                assert_rles(future.result())
                assert future.result().to_rle() == expected.to_rle()
                assert not session.submit(frame).result().has_rles
        future = session.submit(frames[0])  # rows from num_detections on, and after the result
        found = future.result()
        assert_bitmaps(read(session, future.bitmaps()), found)
        for sources in ([frames[0], PICTURES[1], frames[3]], [frames[2], frames[1]]):
            images = [PICTURES[at] for at in ((0, 1, 3) if len(sources) == 3 else (2, 1))]
            batch = session.submit(sources, rle=True)
            late = [batch.bitmaps(place) for place in range(len(sources))]
            for place, expected in enumerate(predictor(images)):
                assert_rles(batch.result()[place])
                assert batch.result()[place].to_rle() == expected.to_rle()
                assert_bitmaps(read(session, late[place]), expected)
    del frame, sources
    frames.clear()
    predictor.close()
    assert_all_freed()


def queued_and_borrowed(folder: str) -> None:
    predictor, _ = start(folder)
    expected = [predictor(image) for image in PICTURES[:2]]
    with predictor.stream(slots=1, when_full="drop_oldest") as session:
        freeze(True)
        future = session.submit(PICTURES[0])
        bitmaps = future.bitmaps()  # nothing has run yet, and nothing waited for it
        assert not future.done()
        dropped, waiting = session.submit(PICTURES[1]), session.submit(PICTURES[1])
        with pytest.raises(FrameDroppedError):
            dropped.bitmaps()
        with pytest.raises(RuntimeError, match="waits for a slot"):
            waiting.bitmaps()
        freeze(False)
        assert_bitmaps(read(session, bitmaps), expected[0])
        kept = bitmaps.copy()
        found = waiting.result()
        again = waiting.bitmaps()  # after the result, the slot being idle
        third = session.submit(PICTURES[0])
        for lent in (bitmaps, again):
            with pytest.raises(RuntimeError, match="in use again"):
                lent.__cuda_array_interface__  # noqa: B018
        with pytest.raises(RuntimeError, match="in use again"):
            future.bitmaps()
        third.result()
        assert_bitmaps(bytes_of(kept), expected[0])
        assert len(found) == len(expected[1])
    with pytest.raises(RuntimeError, match="their session is closed"):
        third.bitmaps()
    del kept
    predictor.close()
    assert_all_freed()


def bytes_of(copied: SharedArray) -> np.ndarray:
    array = np.zeros(copied.shape, copied.dtype)
    ctypes.memmove(array.ctypes.data, copied.address, array.nbytes)
    return array


def more_edges_than_room(folder: str) -> None:
    from comask.runtime.trt import masks

    masks.EDGES_A_COLUMN = 0  # none to begin with
    predictor, _ = start(folder)
    expected = [predictor(image) for image in PICTURES]
    with predictor.stream(slots=1) as session:
        for image, detections in zip(PICTURES, expected, strict=True):
            assert session.submit(image, rle=True).result().to_rle() == detections.to_rle()
        both = session.submit([PICTURES[0], PICTURES[3]], rle=True).result()
        for found, detections in zip(both, predictor([PICTURES[0], PICTURES[3]]), strict=True):
            assert found.to_rle() == detections.to_rle()
        most = counts().device_allocations, counts().host_allocations
        for image in PICTURES:
            session.submit(image, rle=True).result()
        assert (counts().device_allocations, counts().host_allocations) == most
    predictor.close()
    assert_all_freed()


def copies_are_of_their_batch(folder: str) -> None:
    """Though another thread submits to the only slot while one copies."""
    from comask.runtime.trt import lane as lane_module

    predictor, _ = start(folder)
    expected = predictor(PICTURES[0])
    copying, submitted = threading.Event(), threading.Event()
    copied = lane_module.copied

    def slow_copy(*arguments: Any) -> Any:
        copying.set()
        submitted.wait(0.5)  # which it must not be before the copy
        return copied(*arguments)

    lane_module.copied = slow_copy
    with predictor.stream(slots=1) as session:
        first = session.submit(PICTURES[0])
        first.result()

        def submit() -> None:
            copying.wait()
            session.submit(PICTURES[1]).result()
            submitted.set()

        other = threading.Thread(target=submit)
        other.start()
        copy = first.outputs["scores"].copy()
        other.join()
    np.testing.assert_array_equal(bytes_of(copy)[0, : len(expected)], expected.scores)
    del copy
    predictor.close()
    assert_all_freed()


@pytest.mark.parametrize(
    "function",
    [bitmaps_and_rles, queued_and_borrowed, more_edges_than_room, copies_are_of_their_batch],
    ids=lambda function: function.__name__,
)
def test_on_the_standins(function: Any, micro_bundle: Path, tmp_path: Path) -> None:
    skip_without_pycuda()
    run_on_standin(function, shutil.copytree(micro_bundle, tmp_path / "bundle"))


def test_masks_that_lie_over_other_boxes(framed_bundle: Path, tmp_path: Path) -> None:
    skip_without_pycuda()
    run_on_standin(bitmaps_and_rles, shutil.copytree(framed_bundle, tmp_path / "bundle"))
