"""`Predictor.stream`: on ONNX Runtime, and on stand-ins for driver and TensorRT."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_threads import in_threads
from standin import counts, live, run_on_standin, skip_without_pycuda
from standin_engines import PROFILE, assert_equal, picture, write_engines

from comask.errors import EngineError, FrameDroppedError, ImageError, QueueFullError
from comask.kernels import run
from comask.kernels.launch import Matrix, nv12_to_canvas_launch
from comask.runtime import Predictor
from comask.runtime.device import open_device
from comask.runtime.dlpack import stream_handle
from comask.structures import Detections

PICTURES = [picture(96, 128, seed) for seed in range(3)]


# On the host.


@pytest.fixture(scope="module")
def predictor(micro_bundle: Path) -> Any:
    with Predictor.load(micro_bundle, "onnxruntime") as found:
        yield found


def test_host_frames_of_every_layout(predictor: Predictor) -> None:
    image = PICTURES[0]
    expected = predictor(image)
    pitched = np.zeros((96, 140, 3), np.uint8)[:, :128]
    pitched[...] = image
    with predictor.stream() as session:
        for frame, format in [
            (image, "rgb"), (pitched, "rgb"), (torch.from_numpy(image), "rgb"),
            (image[:, :, ::-1], "bgr"), (torch.from_numpy(image).permute(2, 0, 1), "rgb"),
        ]:  # fmt: skip
            future = session.submit(frame, format=format)  # type: ignore[arg-type]
            assert_equal(future.result(), expected)
            assert future.done()
        outputs = future.outputs
        kept = torch.from_dlpack(outputs["scores"].copy())
        found = torch.from_dlpack(outputs["scores"])[0, : len(expected)]
        np.testing.assert_array_equal(found.numpy(), expected.scores)
        both = session.submit([PICTURES[0], PICTURES[1]])
        for one, image in zip(both.result(), PICTURES[:2], strict=True):
            assert len(one) == len(predictor(image))
    np.testing.assert_array_equal(kept[0, : len(expected)].numpy(), expected.scores)
    with pytest.raises(RuntimeError, match="this session is closed"):
        session.submit(image)


def test_host_nv12_is_the_kernels(predictor: Predictor) -> None:
    rng = np.random.default_rng(0)
    luma = rng.integers(0, 256, (65, 80), dtype=np.uint8)[:, :77]
    chroma = rng.integers(0, 256, (33, 90), dtype=np.uint8)[:, :76].reshape(33, 38, 2)
    size = (65, 77)
    matrix: Matrix = "bt2020"
    canvas = np.empty((*size, 3), np.uint8)
    launch = nv12_to_canvas_launch(
        size, (33, 38), (80, chroma.strides[0]), size, size, matrix=matrix, full_range=False
    )
    run.on_host(launch, [luma.ctypes.data, chroma.ctypes.data], canvas.ctypes.data)
    with predictor.stream() as session:
        found = session.submit((luma, chroma), format="nv12", matrix=matrix).result()
    assert_equal(found, predictor(canvas))


@pytest.mark.parametrize(
    ("frames", "format", "words"),
    [
        (np.zeros((8, 8), np.uint8), "rgb", r"rgb frame of uint8 \[8, 8\]"),
        (np.zeros((8, 8, 3), np.float32), "rgb", r"float32 \[8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), "yuv", "unknown frame format 'yuv'"),
        ((np.zeros((8, 8), np.uint8), np.zeros((3, 4, 2), np.uint8)), "nv12", r"\[3, 4, 2\]"),
        ([], "rgb", "a batch of 0 frames"),
        ([picture(96, 128), picture(128, 96)], "rgb", "one for all"),
        ("frame.png", "rgb", "a frame is a str"),
    ],
)
def test_what_is_no_frame_is_refused(
    predictor: Predictor, frames: Any, format: Any, words: str
) -> None:
    with predictor.stream() as session, pytest.raises(ImageError, match=words):
        session.submit(frames, format=format)


def test_handles_of_streams() -> None:
    class Protocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, 5

    class Torch:
        cuda_stream = 7

    assert [stream_handle(s) for s in (3, Protocol(), Torch())] == [3, 5, 7]
    with pytest.raises(TypeError, match="a stream is a str"):
        stream_handle("default")


def test_the_torch_example(micro_bundle: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "torch_pipeline.py"
    done = subprocess.run(
        [sys.executable, example, micro_bundle, "--frames", "4", "--backend", "onnxruntime"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        f"frame {i}" for i in range(4)
    ]


# On the stand-ins.


class GpuFrame:
    """A frame in the stand-in's device memory, with the interface of a CUDA array."""

    def __init__(self, image: np.ndarray, stream: int | None = None) -> None:
        self.device_memory = open_device()
        with self.device_memory:
            self.memory = self.device_memory.memory(image.nbytes)
        ctypes.memmove(self.memory.address, np.ascontiguousarray(image).ctypes.data, image.nbytes)
        self.__cuda_array_interface__ = {
            "shape": image.shape, "typestr": "|u1", "data": (self.memory.address, False),
            "version": 3, "strides": None, "stream": stream,
        }  # fmt: skip

    def __del__(self) -> None:
        with self.device_memory:
            self.memory.free()


def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def freeze(yes: bool) -> None:
    ctypes.c_int.in_dll(driver(), "standin_frozen").value = yes


def start(folder: str) -> tuple[Predictor, list[Detections]]:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    with Predictor.load(folder, "onnxruntime") as predictor:
        expected = [predictor(image) for image in PICTURES]
    return Predictor.load(folder, "tensorrt"), expected


def assert_all_freed() -> None:
    import standin_tensorrt

    gc.collect()
    assert standin_tensorrt.failures == []
    assert live() == {}
    assert set(standin_tensorrt.alive.values()) == {0}


def replayed_graphs_and_eager(folder: str) -> None:
    predictor, expected = start(folder)
    frames = [GpuFrame(image) for image in PICTURES]
    for graphs in (False, True):
        before = counts().graph_launches
        with predictor.stream(graphs=graphs, slots=2) as session:
            for _ in range(4):
                futures = [session.submit(frame) for frame in frames]
                for future, detections in zip(futures, expected, strict=True):
                    assert_equal(future.result(), detections)
            portrait = session.submit(GpuFrame(picture(64, 64)))
            assert_equal(portrait.result(), predictor(picture(64, 64)))
            assert_equal(session.submit(PICTURES[1]).result(), expected[1])  # from the host
            two = session.submit([PICTURES[0], frames[1]]).result()
            for found, together in zip(two, predictor(PICTURES[:2]), strict=True):
                assert_equal(found, together)
        assert (counts().graph_launches > before + 4) == graphs
    predictor.close()
    frames.clear()
    assert_all_freed()


def capture_that_fails(folder: str) -> None:
    predictor, expected = start(folder)
    ctypes.c_int.in_dll(driver(), "standin_no_capture").value = 1
    with predictor.stream(slots=1) as session:
        for _ in range(4):
            assert_equal(session.submit(PICTURES[0]).result(), expected[0])
    assert counts().graph_launches == 0
    predictor.close()
    assert_all_freed()


def order_with_the_callers_stream(folder: str) -> None:
    predictor, expected = start(folder)
    device = open_device()
    with device:
        theirs = device.stream()
        with predictor.stream(theirs.handle) as session:
            for says in ("submit", "interface"):
                written = device.stream() if says == "interface" else theirs
                frame = GpuFrame(np.zeros_like(PICTURES[0]), written.handle)
                written.copy_in(frame.memory, PICTURES[0])  # waits in the stream
                if says == "submit":
                    future = session.submit(frame)
                else:
                    with predictor.stream() as other:
                        assert_equal(other.submit(frame).result(), expected[0])
                    written.close()
                    continue
                copied = np.zeros(1, np.int32)
                count = future.outputs["num_detections"]
                future.wait_on(theirs.handle)
                status = driver().cuMemcpyDtoHAsync_v2(
                    ctypes.c_void_p(copied.ctypes.data), ctypes.c_void_p(count.address),
                    ctypes.c_size_t(4), ctypes.c_void_p(theirs.handle),
                )  # fmt: skip
                assert status == 0
                theirs.synchronize()
                assert copied[0] == len(expected[0])
                assert_equal(future.result(), expected[0])
        theirs.close()
    del frame, count, future
    predictor.close()
    assert_all_freed()


def frames_are_held_until_read(folder: str) -> None:
    predictor, expected = start(folder)
    with predictor.stream() as session:
        freeze(True)
        frame = GpuFrame(PICTURES[0])
        gone = weakref.ref(frame)
        future = session.submit(frame)
        del frame
        gc.collect()
        assert gone() is not None
        assert not future.done()
        freeze(False)
        assert_equal(future.result(), expected[0])
        gc.collect()
        assert gone() is None
    predictor.close()
    assert_all_freed()


def full_queues(folder: str) -> None:
    predictor, expected = start(folder)
    with predictor.stream(when_full="raise", slots=2) as session:
        freeze(True)
        futures = [session.submit(image) for image in PICTURES[:2]]
        with pytest.raises(QueueFullError, match="all 2 slots"):
            session.submit(PICTURES[2])
        with pytest.raises(TimeoutError):
            futures[0].result(0.01)
        freeze(False)
        assert_equal(futures[1].result(), expected[1])
        assert_equal(session.submit(PICTURES[2]).result(), expected[2])
        assert_equal(futures[0].result(), expected[0])
    with predictor.stream(timeout=0.01, slots=1) as session:
        freeze(True)
        first = session.submit(PICTURES[0])
        with pytest.raises(QueueFullError):
            session.submit(PICTURES[1])
        freeze(False)
        assert_equal(first.result(), expected[0])
    with predictor.stream(slots=2) as session:  # more than fit: complete ones wait on the host
        futures = [session.submit(PICTURES[i % 3]) for i in range(9)]
        borrowed = futures[0].outputs["boxes"]
        with pytest.raises(RuntimeError, match="their slot is in use again"):
            borrowed.__dlpack__()
        for i, future in enumerate(futures):
            assert_equal(future.result(), expected[i % 3])
    with predictor.stream(when_full="drop_oldest", slots=1) as session:
        freeze(True)
        running, dropped, waiting = (session.submit(image) for image in PICTURES)
        with pytest.raises(FrameDroppedError):
            dropped.result()
        with pytest.raises(RuntimeError, match="waits for a slot"):
            waiting.outputs  # noqa: B018
        freeze(False)
        assert_equal(waiting.result(), expected[2])
        assert_equal(running.result(), expected[0])
    predictor.close()
    assert_all_freed()


def eight_threads(folder: str) -> None:
    predictor, expected = start(folder)
    frames = [GpuFrame(image) for image in PICTURES]
    with predictor.stream(slots=3) as session:

        def work(place: int) -> None:
            for i in range(15):
                at = (place + i) % 3
                if i % 5 == 4:
                    assert_equal(predictor(PICTURES[at]), expected[at])
                future = session.submit(frames[at])
                assert_equal(future.result(60), expected[at])

        assert in_threads(8, work) == []
    frames.clear()
    predictor.close()
    assert_all_freed()


def many_frames(folder: str) -> None:
    predictor, expected = start(folder)
    frame = GpuFrame(PICTURES[0])
    with predictor.stream() as session:
        for _ in range(12):
            last = session.submit(frame)
        warm = counts().device_allocations, counts().host_allocations, counts().events_live
        for _ in range(60):  # test_stream_load.py has ten thousand
            last = session.submit(frame)
        assert_equal(last.result(), expected[0])
        found = counts().device_allocations, counts().host_allocations, counts().events_live
        assert found == warm
    del frame
    predictor.close()
    assert_all_freed()


def errors_and_closing(folder: str) -> None:
    predictor, expected = start(folder)
    predictor.close()
    write_engines(
        folder, profile={**PROFILE.ranges(), "width": (32, 128, 128), "height": (96, 96, 96)}
    )
    predictor = Predictor.load(folder, "tensorrt")
    session = predictor.stream(slots=1)
    for _ in range(2):
        with pytest.raises(EngineError, match="stage1: images"):
            session.submit(picture(128, 96))
    kept = session.submit(PICTURES[0])
    copy = kept.outputs["scores"].copy()
    again = copy.copy()
    assert again.__cuda_array_interface__["data"][0] != copy.__cuda_array_interface__["data"][0]
    assert again.__dlpack_device__() == (2, 0)
    outputs = kept.outputs
    predictor.close()  # and with it the session
    assert_equal(kept.result(), expected[0])
    with pytest.raises(RuntimeError, match="closed"):
        session.submit(PICTURES[0])
    with pytest.raises(RuntimeError, match="their session is closed"):
        outputs["scores"].copy()
    scores = np.zeros(len(expected[0]), np.float32)
    ctypes.memmove(scores.ctypes.data, again.address, scores.nbytes)
    np.testing.assert_array_equal(scores, expected[0].scores)
    session.close()
    del copy, again
    assert_all_freed()


@pytest.mark.parametrize(
    "function",
    [replayed_graphs_and_eager, capture_that_fails, order_with_the_callers_stream,
     frames_are_held_until_read, full_queues, eight_threads, many_frames, errors_and_closing],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_on_the_standins(function: Any, micro_bundle: Path, tmp_path: Path) -> None:
    skip_without_pycuda()
    run_on_standin(function, shutil.copytree(micro_bundle, tmp_path / "bundle"))
