"""FFmpeg's own CUDA code in our context: PyAV as users have it, on stand-ins for what is NVIDIA's.

One stand-in driver serves pycuda, which opens the primary context, and FFmpeg, which loads it by name, as
it loads the stand-in decoder. Nothing of comask, PyAV or FFmpeg is replaced.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import logging
import shutil
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from conftest import run
from in_threads import in_threads
from standin import counts, live, run_on_standin, skip_without_pycuda
from standin_engines import write_engines
from test_video_source import server
from video_clips import decoded, make_clip, pictures, sound_packets
from video_gpu import write_pictures

from comask.errors import BackendUnavailableError, VideoError
from comask.runtime.device import open_device
from comask.runtime.dlpack import UNORDERED, borrow
from comask.runtime.video import VideoSource
from comask.runtime.video.hardware import (
    FFMPEG_STREAM,
    NVENC,
    GpuCodecs,
    Nv12Picture,
    choose_encoder,
)

skip_without_pycuda()

NVENC_MISSING = "FFmpeg cannot open h264_nvenc on GPU 0 (Cannot load libnvidia-encode.so.1; "


def nv12_of(picture: object) -> np.ndarray:
    """A picture on the GPU, copied to the host by us, on our stream, as the network's kernel reads it."""
    assert isinstance(picture, Nv12Picture)
    rows = []
    with open_device() as device:
        stream = device.stream()
        for plane in picture.planes:
            borrowed = borrow(plane, UNORDERED)
            height, pitch = borrowed.shape[0], borrowed.strides[0]
            stream.wait_for(FFMPEG_STREAM)
            copied = device.memory(height * pitch)
            stream.copy_over(copied, borrowed.address)
            values = np.zeros((height, pitch), np.uint8)
            stream.copy_out(values, copied)
            stream.synchronize()
            rows.append(values[:, : picture.size[1]])
            copied.free()
            borrowed.release()
        stream.close()
    return np.concatenate(rows)


def expected_of(clip: str) -> list[np.ndarray]:
    return [frame.reformat(format="nv12").to_ndarray() for frame in decoded(Path(clip))]


def assert_context_is_ours_alone() -> None:
    """FFmpeg has left nothing behind and destroyed nothing, and the context works."""
    gc.collect()
    assert live() == {}
    assert (counts().contexts_retained, counts().contexts_destroyed) == (1, 0)
    with open_device() as device:
        device.memory(100).free()
    decoders = ctypes.c_int.in_dll(ctypes.CDLL("libnvcuvid.so.1"), "standin_decoders")
    assert decoders.value == 0


def state_of_the_primary_context() -> tuple[int, int]:
    flags, active = ctypes.c_uint(), ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState(
        0, ctypes.byref(flags), ctypes.byref(active)
    )
    return flags.value, active.value


def what_pyav_does_by_default_is_refused(clip: str) -> None:
    """So the settings of `GpuCodecs` are needed; and so is the context, which they take as it is."""
    accelerated = av.codec.hwaccel.HWAccel("cuda", device=0, is_hw_owned=True)
    assert state_of_the_primary_context() == (0, 0)
    open_device()
    assert state_of_the_primary_context() == (0, 1)  # flags 0, which FFmpeg does not want
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuDevicePrimaryCtxSetFlags_v2(0, 4) == 708
    with pytest.raises(OSError, match="Operation not supported"):
        av.open(clip, hwaccel=accelerated)

    with GpuCodecs(open_device()) as hwaccel:
        pass
    with av.open(clip, hwaccel=hwaccel) as container:  # no context is current
        assert next(container.decode(video=0)).format.name == "yuv420p"
    del container
    assert_context_is_ours_alone()


def sources_share_the_context(clip: str) -> None:
    expected = expected_of(clip)
    first, second = (VideoSource(clip, decode="gpu", gpu=0) for _ in range(2))
    frames = iter(first)
    kept = [next(frames).picture for _ in range(3)]
    for frame, values in zip(second, expected, strict=True):
        np.testing.assert_array_equal(nv12_of(frame.picture), values)
    second.close()
    del second, frame
    gc.collect()
    kept += [frame.picture for frame in frames]  # the second one's end did not disturb it
    first.close()
    del first, frames
    gc.collect()
    for picture, values in zip(kept, expected, strict=True):  # after both decoders' end
        np.testing.assert_array_equal(nv12_of(picture), values)
    assert counts().planes_fetched == 0
    assert isinstance(kept[0], Nv12Picture)
    np.testing.assert_array_equal(
        kept[0].pixels, decoded(Path(clip))[0].reformat(format="nv12").to_ndarray(format="rgb24")
    )
    assert counts().planes_fetched == 2
    kept.clear()
    del picture
    assert_context_is_ours_alone()


def other_threads_decode(clip: str) -> None:
    """None of which has a context of its own."""
    expected = expected_of(clip)

    def decode(_: int) -> None:
        with VideoSource(clip, decode="gpu", gpu=0) as source:
            for frame, values in zip(source, expected, strict=True):
                np.testing.assert_array_equal(nv12_of(frame.picture), values)

    assert in_threads(3, decode) == []
    assert_context_is_ours_alone()


def a_stream_that_comes_back_is_decoded_on_the_gpu_again(clip: str) -> None:
    expected = 2 * expected_of(clip)
    with (
        server(Path(clip).read_bytes(), connections=2) as address,
        VideoSource(address, patience=2.5, decode="gpu", gpu=0) as source,
    ):
        found = [nv12_of(frame.picture) for frame in source]
    assert source.reconnects == 1
    assert source.decoded_on == "gpu"
    np.testing.assert_array_equal(found, expected)
    del source
    assert_context_is_ours_alone()


def a_frame_may_outlive_everything(clip: str) -> None:
    """Modules, and so this frame, end after the context."""
    source = VideoSource(clip, gpu=0)
    sys.kept = next(iter(source)).picture  # type: ignore[attr-defined]
    assert isinstance(sys.kept, Nv12Picture)  # type: ignore[attr-defined]


def what_the_decoder_refuses_is_decoded_or_an_error(clip: str) -> None:
    refuse()
    with VideoSource(clip, gpu=0) as source:
        frames = [frame.picture for frame in source]
    assert source.decoded_on == "cpu"
    words = "frames are yuv420p in the host's memory: the GPU does not decode this profile or size"
    assert str(source.detour).startswith(words)
    for ours, theirs in zip(frames, decoded(Path(clip)), strict=True):
        np.testing.assert_array_equal(ours, theirs.to_ndarray(format="rgb24"))
    with (
        VideoSource(clip, gpu=0, decode="gpu") as source,
        pytest.raises(VideoError, match=f"frames cannot stay on the GPU: {words}"),
    ):
        next(iter(source))
    del source
    assert_context_is_ours_alone()


def nvenc_is_tried_in_the_context(clip: str) -> None:
    """As far as NVIDIA's library, which is missing."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("comask").addHandler(handler)
    before = counts().device_allocations
    for _ in range(2):
        with pytest.raises(BackendUnavailableError) as caught:
            choose_encoder("gpu", 0, (95, 127))
        words = f"encoding on the GPU is not possible: {NVENC_MISSING}The minimum required Nvidia"
        assert str(caught.value).startswith(words)
    assert (
        counts().device_allocations == before + 2 * 32
    )  # of frames to encode: the context was current
    before = counts().device_allocations
    nvenc = replace(NVENC, gpu=GpuCodecs(open_device()))
    with av.open(io.BytesIO(), "w", format="matroska") as output:  # as in a file
        track = nvenc.add_to(output, Fraction(25))
        track.width, track.height, track.codec_context.time_base = 128, 96, Fraction(1, 25)
        with pytest.raises(OSError, match="Operation not permitted"):
            track.encode(av.VideoFrame(128, 96, "yuv420p"))
    assert counts().device_allocations == before + 32
    del output, track
    for _ in range(3):
        assert choose_encoder("auto", 0, (96, 128)).codec == "libx264"
    assert [message.partition(" (")[0] for message in messages] == [
        "encoding on the CPU: FFmpeg cannot open h264_nvenc on GPU 0"
    ]
    assert av.logging.get_level() is None  # as before
    del caught
    assert_context_is_ours_alone()


def the_command_says_where_it_decodes_and_encodes(clip: str, folder: str, output: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    arguments = ("infer", folder, clip, "--backend", "tensorrt", "--batch", 3, "--output", output)
    result = run(*arguments, "--json", Path(output, "r.json"))
    assert result.exit_code == 0, result.output
    (report,) = json.loads(Path(output, "r.json").read_text())["videos"]
    assert (report["decoded_on"], report["detour"], report["encoder"]) == ("gpu", None, "libx264")
    assert result.stderr.count(f"encoding on the CPU: {NVENC_MISSING}") == 1
    overlay = Path(output, "a.mp4.overlay.mp4")
    assert len(decoded(overlay)) == 20
    assert sound_packets(overlay) == sound_packets(Path(clip))

    result = run(*arguments, "--encode", "gpu", "--save", "overlay")
    assert result.exit_code == 1
    assert f"encoding on the GPU is not possible: {NVENC_MISSING}" in result.output

    refuse()
    result = run(*arguments, "--json", Path(output, "r.json"), "--save", "coco")
    assert result.exit_code == 0, result.output
    words = "copied to the GPU: frames are yuv420p in the host's memory: the GPU does not decode"
    (line,) = (line for line in result.output.splitlines() if "a.mp4: 20 frames in" in line)
    assert words in line
    (report,) = json.loads(Path(output, "r.json").read_text())["videos"]
    assert (report["decoded_on"], report["encoder"]) == ("cpu", None)
    assert report["detour"] in line
    result = run(*arguments, "--decode", "gpu")
    assert result.exit_code == 1
    assert "frames cannot stay on the GPU: frames are yuv420p" in result.output


def refuse() -> None:
    ctypes.c_int.in_dll(ctypes.CDLL("libnvcuvid.so.1"), "standin_no_decoder").value = 1


@pytest.mark.parametrize(
    "function",
    [what_pyav_does_by_default_is_refused, sources_share_the_context, other_threads_decode,
     a_stream_that_comes_back_is_decoded_on_the_gpu_again, nvenc_is_tried_in_the_context,
     what_the_decoder_refuses_is_decoded_or_an_error, a_frame_may_outlive_everything],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_ffmpeg_in_our_context(function: Any, tmp_path: Path) -> None:
    suffix = "ts" if "stream" in function.__name__ else "mp4"
    clip = make_clip(tmp_path / f"a.{suffix}", pictures(20, 96, 128))
    run_on_standin(function, clip, STANDIN_PICTURES=str(write_pictures(clip)))


def test_the_command_on_a_gpu_with_a_decoder_alone(micro_bundle: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(20, 96, 128))
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")
    run_on_standin(
        the_command_says_where_it_decodes_and_encodes, clip, bundle, tmp_path / "out",
        STANDIN_PICTURES=str(write_pictures(clip)),
    )  # fmt: skip
