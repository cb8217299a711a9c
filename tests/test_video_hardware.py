"""Frames on the GPU through the network, and the way without a GPU; stand-ins for what is NVIDIA's.

What FFmpeg does in our CUDA context is in test_video_ffmpeg_cuda.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest
from conftest import run
from PIL import Image
from standin import counts, live, run_on_standin, skip_without_pycuda
from standin_engines import assert_equal, write_engines
from video_clips import decoded, make_clip, pictures, sound_packets
from video_gpu import decoded_like, noise, write_pictures

from comask.errors import BackendUnavailableError, VideoError
from comask.runtime import Predictor
from comask.runtime.dlpack import borrow
from comask.runtime.frames import Coding, borrow_frame
from comask.runtime.gpu import Gpu, find_gpu
from comask.runtime.video import (
    JsonLines,
    OverlayWriter,
    SourceFrame,
    VideoPipeline,
    VideoSource,
    hardware,
)
from comask.runtime.video import source as video_source
from comask.runtime.video.container import UPRIGHT, Orientation
from comask.runtime.video.hardware import MATRICES, Nv12Picture, nv12_problem
from comask.runtime.video.pipeline import Inference
from comask.structures import Detections

NO_GPU = pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU, and this is without")


class Kept:
    """A sink that keeps all."""

    def __init__(self) -> None:
        self.frames: list[SourceFrame] = []
        self.found: list[Detections] = []
        self.had_rles: list[bool] = []  # when they came

    def add(self, frame: SourceFrame, found: Detections, track_ids: object) -> None:
        self.frames.append(frame)
        self.found.append(found)
        self.had_rles.append(found.has_rles)


class Nv12OnHost(VideoSource):
    """Gives frames as NV12 where PyAV has them, in the host's memory."""

    def __iter__(self) -> Iterator[SourceFrame]:
        plain = decoded(Path(self.name))
        for frame in super().__iter__():
            picture = Nv12Picture(plain[frame.index].reformat(format="nv12"))
            yield dataclasses.replace(frame, picture=picture)


def rgb_of(luma: np.ndarray, chroma: np.ndarray, picture: Nv12Picture) -> np.ndarray:
    frame = borrow_frame((luma, chroma), -1, Coding("nv12", picture.matrix, picture.full_range))
    return frame.pixels()


# What is NV12, and how its colours are meant.


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("colorspace", MATRICES)
def test_colours_are_read_as_ffmpeg_reads_them(colorspace: int, full: bool) -> None:
    frame = noise(colorspace, 2 if full else 1)
    picture = Nv12Picture(frame.reformat(format="nv12"))
    theirs = frame.to_ndarray(format="rgb24").astype(int)
    assert picture.full_range == full
    for matrix in set(MATRICES.values()):
        ours = borrow_frame(picture.planes, -1, Coding("nv12", matrix, full)).pixels()
        # swscale adds up tables of its own that cut off instead of rounding
        assert (np.abs(ours - theirs).max() <= 3) == (matrix == picture.matrix)


@pytest.mark.parametrize("name", ["car-detection.mp4", "one-by-one-person-detection_first60s.mp4"])
def test_nv12_of_real_clips(shared_data: Path, micro_bundle: Path, name: str) -> None:
    clip, found = shared_data / "video" / name, {}
    with Predictor.load(micro_bundle, "onnxruntime") as predictor:
        for kind in (VideoSource, Nv12OnHost):
            found[kind] = Kept()
            VideoPipeline(predictor, kind(clip, every=60), [found[kind]], batch=4).run()
        converted = [
            borrow_frame(
                picture.planes, -1, Coding("nv12", picture.matrix, picture.full_range)
            ).pixels()
            for picture in (frame.picture for frame in found[Nv12OnHost].frames)
        ]
        expected = predictor(converted)
    rgb, nv12 = found[VideoSource], found[Nv12OnHost]
    for plain, frame in zip(rgb.frames, nv12.frames, strict=True):
        assert (frame.index, frame.pts, frame.time) == (plain.index, plain.pts, plain.time)
        picture = frame.picture
        assert isinstance(picture, Nv12Picture)
        assert picture.matrix == "bt601"  # so OpenCV's constants are the right ones
        luma, chroma = (np.asarray(borrow(plane)) for plane in picture.planes)
        ours, ffmpegs = rgb_of(luma, chroma, picture), plain.pixels.astype(int)
        # FFmpeg's conversion cuts off instead of rounding: darker by 1 on average, by 3 at most
        assert np.abs(ours - ffmpegs).max() <= 3
        assert 0 <= (ours - ffmpegs).mean() <= 1.1
        luma = np.maximum(luma, 16)  # OpenCV takes what is blacker than black for black
        theirs = cv2.cvtColorTwoPlane(luma, chroma.copy(), cv2.COLOR_YUV2RGB_NV12)
        assert np.abs(rgb_of(luma, chroma, picture).astype(int) - theirs).max() <= 1
    for ours, theirs in zip(nv12.found, expected, strict=True):
        assert len(ours) == len(theirs) > 0
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
        np.testing.assert_allclose(ours.boxes_xyxy, theirs.boxes_xyxy, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, None), ({"format": "yuv420p"}, "so h264 decodes on the CPU"),
     ({"sw_format": "p010le"}, "8 bits"),
     ({"orientation": Orientation(mirror_x=True)}, "turned or mirrored"),
     ({"colorspace": 4}, "colour matrix 4")],
)  # fmt: skip
def test_what_cannot_stay_on_the_gpu_is_told(changes: dict[str, Any], words: str | None) -> None:
    codec: Any = SimpleNamespace(name="h264", is_hwaccel=True)
    rest = {name: value for name, value in changes.items() if name != "orientation"}
    orientation = changes.get("orientation", UPRIGHT)
    problem = nv12_problem(decoded_like(**rest), codec, orientation)
    assert problem is None if words is None else words in str(problem)


def test_av1_says_which_decoder_is_taken_and_may_use_every_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(4), codec="libsvtav1")
    cuda = av.codec.hwaccel.HWAccel("cuda", device=0, is_hw_owned=True)  # not opened for libdav1d
    monkeypatch.setattr(video_source, "gpu_decoder", lambda *_: (nullcontext(cuda), None))
    with VideoSource(clip, gpu=0, decode="gpu") as source:
        with pytest.raises(VideoError, match="PyAV decodes this codec by libdav1d, which uses no"):
            next(iter(source))
        assert source._video.thread_type.name == "AUTO"


# Through the network.


def test_frames_of_any_sizes_are_a_call_of_the_predictor(micro_bundle: Path) -> None:
    wide, tall = pictures(5), pictures(3, 96, 64)
    images = [wide[0], tall[0], wide[1], wide[2], tall[1], wide[3], wide[4], tall[2]]
    frames = [SourceFrame(i, i, Fraction(i), image) for i, image in enumerate(images)]
    with Predictor.load(micro_bundle, "onnxruntime", max_batch=2) as predictor:
        expected = predictor(list(images))
        with Inference(predictor, 3) as inference:
            inference.submit(frames)
            found = list(inference.results(last=True))
    assert [frame.index for frame, _ in found] == list(range(len(images)))
    for (_, ours), theirs in zip(found, expected, strict=True):
        assert_equal(ours, theirs)


def decoded_on_the_gpu(folder: str, clip: str, output: str) -> None:
    """The results of NV12 on the host, without a frame that was copied there."""
    predictor = start(folder)
    on_host, kept = Kept(), Kept()
    VideoPipeline(predictor, Nv12OnHost(clip), [on_host], batch=3).run()
    lines = Path(output, "a.jsonl")
    with JsonLines(lines) as sink:
        source = VideoSource(clip, gpu=predictor.stages.gpu)
        report = VideoPipeline(predictor, source, [kept, sink], batch=3).run()
    assert report.frames == len(lines.read_text().splitlines()) == len(on_host.found) == 20
    assert (report.decoded_on, report.detour) == ("gpu", None)
    assert counts().planes_fetched == 0
    assert all(kept.had_rles)  # as JSON lines want them
    assert not any(on_host.had_rles)
    for ours, theirs in zip(kept.found, on_host.found, strict=True):
        assert_equal(ours, theirs)
    pixels = [frame.pixels for frame in kept.frames for _ in range(2)]  # two sinks ask
    assert counts().planes_fetched == 2 * 20
    np.testing.assert_array_equal(
        pixels[::2],
        [f.reformat(format="nv12").to_ndarray(format="rgb24") for f in decoded(Path(clip))],
    )
    kept.frames.clear()
    on_host.frames.clear()
    predictor.close()
    del source
    gc.collect()
    assert live() == {}
    assert (counts().contexts_retained, counts().contexts_destroyed) == (1, 0)


def frames_before_an_error_have_results(folder: str, clip: str, output: str) -> None:
    class Ending(VideoSource):
        def __iter__(self) -> Iterator[SourceFrame]:
            yield from itertools.islice(super().__iter__(), 5)
            raise VideoError("lost")

    predictor, kept = start(folder), Kept()
    freeze(True)  # so that none is done when the error comes
    with pytest.raises(VideoError, match="lost"):
        VideoPipeline(predictor, Ending(clip), [kept], batch=3).run()
    assert [frame.index for frame in kept.frames] == list(range(5))
    predictor.close()


def results_do_not_wait_for_the_next_frames(folder: str, clip: str, output: str) -> None:
    written = threading.Event()

    class Third(Kept):
        def add(self, frame: SourceFrame, found: Detections, track_ids: object) -> None:
            super().add(frame, found, track_ids)
            if frame.index == 2:
                written.set()

    class Slow(VideoSource):
        def __iter__(self) -> Iterator[SourceFrame]:
            for frame in super().__iter__():
                if frame.index == 3:
                    assert written.wait(20)
                yield frame

    predictor, kept = start(folder), Third()
    VideoPipeline(predictor, Slow(clip), [kept], batch=3).run()
    assert len(kept.frames) == 20
    predictor.close()


def only_who_wants_rles_has_them_found(folder: str, clip: str, output: str) -> None:
    predictor = start(folder)
    for named, wanted in ((False, False), (True, True)):
        kept = Kept()
        kept.wants_rle = named  # type: ignore[attr-defined]
        VideoPipeline(predictor, VideoSource(clip, every=5), [kept], batch=3).run()
        assert len(kept.found) == 4
        assert set(kept.had_rles) == {wanted}
    predictor.close()


def overlay_of_the_gpus_frames(folder: str, clip: str, output: str) -> None:
    predictor = start(folder)
    source = VideoSource(clip, gpu=predictor.stages.gpu, audio=True)
    with OverlayWriter(Path(output, "o"), source, encode="cpu") as writer:
        report = VideoPipeline(predictor, source, [writer], batch=3).run()
    assert (report.decoded_on, writer.encoder) == ("gpu", "libx264")
    assert counts().planes_fetched == 2 * 20
    assert len(decoded(writer.path)) == 20
    assert sound_packets(writer.path) == sound_packets(Path(clip))
    predictor.close()


def batches_side_by_side(folder: str, clip: str, output: str) -> None:
    """Nothing waits for a GPU that is at work, until as much is on its way as may be."""
    predictor = start(folder)
    with VideoSource(clip) as source, Inference(predictor, 3) as inference:
        frames = list(source)
        freeze(True)
        for first in (0, 3):
            inference.submit(frames[first : first + 3])
            assert list(inference.results()) == []
        inference.submit(frames[6:9])
        freeze(False)
        assert [frame.index for frame, _ in inference.results()][:3] == [0, 1, 2]
        rest = [frame.index for frame, _ in inference.results(last=True)]
        assert rest == list(range(9))[-len(rest) :]
    predictor.close()


def start(folder: str) -> Predictor:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    predictor = Predictor.load(folder, "tensorrt", max_batch=3)
    assert predictor.stages.gpu == 0
    return predictor


def freeze(yes: bool) -> None:
    ctypes.c_int.in_dll(ctypes.CDLL("libcuda.so.1"), "standin_frozen").value = yes


@pytest.mark.parametrize(
    "function",
    [decoded_on_the_gpu, overlay_of_the_gpus_frames, batches_side_by_side,
     frames_before_an_error_have_results, results_do_not_wait_for_the_next_frames,
     only_who_wants_rles_has_them_found],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_on_the_standins(function: Any, micro_bundle: Path, tmp_path: Path) -> None:
    skip_without_pycuda()
    clip = make_clip(tmp_path / "a.mp4", pictures(20, 96, 128))
    run_on_standin(
        function, shutil.copytree(micro_bundle, tmp_path / "bundle"), clip, tmp_path,
        STANDIN_PICTURES=str(write_pictures(clip)),
    )  # fmt: skip


# Asking for a GPU, through the command.


@NO_GPU
def test_without_a_gpu_the_command_says_why_or_does_without(
    micro_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clip, output = make_clip(tmp_path / "a.mp4", pictures(4)), tmp_path / "out"
    command = ("infer", micro_bundle, clip, "--output", output)
    caplog.set_level(logging.INFO)
    result = run(*command, "--json", tmp_path / "r.json")
    assert result.exit_code == 0
    (report,) = json.loads((tmp_path / "r.json").read_text())["videos"]
    assert (report["decoded_on"], report["detour"], report["encoder"]) == ("cpu", None, "libx264")
    assert "on the CPU" not in result.output  # nothing else was to be expected
    assert "decoding on the CPU: the backend reads frames in the host's memory" in caplog.text
    assert "encoding on the CPU: no NVIDIA driver" in caplog.text
    shutil.rmtree(output)

    monkeypatch.setattr(VideoSource, "__iter__", lambda self: pytest.fail("a frame was decoded"))
    for arguments, words in [
        (("--decode", "gpu"), "decoding on the GPU is not possible: the backend reads frames in"),
        (("--encode", "gpu"), "encoding on the GPU is not possible: no NVIDIA driver"),
        (("--encode", "gpu", "--device", "cpu"), "only the CPU is to be used"),
        (("--encode", "gpu", "--save", "coco"), "--encode is for overlays"),
    ]:
        result = run(*command, *arguments)
        assert result.exit_code == 1
        last = result.output.splitlines()[-1]
        assert last.startswith("error: ")
        assert words in last
        assert not list(output.glob("*.mp4"))
    # a driver that pycuda cannot load
    found = (Gpu("fake", 90, 13000, 2**30), "")
    monkeypatch.setattr(hardware, "find_gpu_or_reason", lambda index: found)
    result = run(*command, "--encode", "gpu")
    assert "encoding on the GPU is not possible: pycuda cannot be imported (" in result.output
    with pytest.raises(
        BackendUnavailableError, match="decoding on the GPU is not possible: pycuda"
    ):
        VideoSource(clip, decode="gpu", gpu=1)


def test_images_are_neither_decoded_nor_encoded_by_a_gpu(
    micro_bundle: Path, tmp_path: Path
) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    for option in ("--decode", "--encode"):
        result = run("infer", micro_bundle, tmp_path / "a.png", "--output", tmp_path, option, "cpu")
        assert result.exit_code == 1
        assert "are for videos, and no input is one" in result.output
