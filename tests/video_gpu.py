"""Frames as PyAV gives them where a GPU decodes: their planes are in the stand-in's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from types import SimpleNamespace
from typing import Any
from unittest import mock

import av
import numpy as np

from comask.runtime.device import open_device
from comask.runtime.dlpack import UNORDERED, SharedArray
from comask.runtime.video import VideoSource, source
from comask.runtime.video.container import open_container
from comask.runtime.video.hardware import FFMPEG_STREAM


class GpuPlane:
    """A plane, copied in on FFmpeg's stream; like PyAV's it hands out memory, but orders no streams."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = np.ascontiguousarray(values)  # until the copy is done
        self._device = open_device()
        with self._device:
            self._memory = self._device.memory(values.nbytes)
            status = ctypes.CDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2(
                ctypes.c_void_p(self._memory.address), ctypes.c_void_p(self._values.ctypes.data),
                ctypes.c_size_t(values.nbytes), ctypes.c_void_p(FFMPEG_STREAM),
            )  # fmt: skip
        assert status == 0

    def __del__(self) -> None:
        with self._device:
            self._memory.free()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int | None = None) -> object:
        if stream is not None:
            raise NotImplementedError("CUDA stream synchronization is not supported")
        owner: Any = self  # as long as the capsule lives; not asked, as no stream is named
        shared = SharedArray(self._memory.address, self._values.shape, self._values.dtype, 0, owner)
        return shared.__dlpack__(stream=UNORDERED)


class GpuDecoded:
    """A frame; `downloads` counts those of any that were brought to the host."""

    downloads = 0

    def __init__(self, decoded: av.VideoFrame) -> None:
        self._decoded = decoded
        nv12 = decoded.reformat(format="nv12").to_ndarray()
        height, width = decoded.height, decoded.width
        luma, chroma = nv12[:height, :width], nv12[height:].reshape(height // 2, width // 2, 2)
        self.planes = (GpuPlane(luma), GpuPlane(chroma))
        self.format, self.sw_format = SimpleNamespace(name="cuda"), SimpleNamespace(name="nv12")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoded, name)

    def to_ndarray(self, format: str) -> np.ndarray:
        type(self).downloads += 1
        return self._decoded.to_ndarray(format=format)


@contextmanager
def gpu_decoding(place: Any = GpuDecoded) -> Iterator[None]:
    """In this block sources take it that there is a GPU, which gives frames as `place` makes them."""
    decoded = VideoSource._decoded

    def placed(self: VideoSource) -> Iterator[tuple[int, int | None, Fraction, Any]]:
        for index, stamp, moment, (frame, orientation) in decoded(self):
            here = place(frame) if self._hwaccel is not None else frame
            yield index, stamp, moment, (here, orientation)

    with ExitStack() as stack:
        for name, value in {
            "gpu_decoder": lambda decode, gpu: None if decode == "cpu" else object(),
            "open_container": lambda address, hwaccel=None: open_container(address),
        }.items():
            stack.enter_context(mock.patch.object(source, name, value))
        stack.enter_context(mock.patch.object(VideoSource, "_decoded", placed))
        yield


def decoded_like(**changes: Any) -> Any:
    """What can be asked of a decoded frame, of one that the network can read but for `changes`."""
    names = {key: SimpleNamespace(name=changes.pop(key, default))
             for key, default in (("format", "cuda"), ("sw_format", "nv12"))}  # fmt: skip
    return SimpleNamespace(**names, **{"colorspace": 1, "color_range": 1} | changes)


def noise(colorspace: int, color_range: int) -> av.VideoFrame:
    """64 x 64 pixels of YUV that state a matrix and a range."""
    frame, rng = av.VideoFrame(64, 64, "yuv420p"), np.random.default_rng(0)
    for plane in frame.planes:
        plane.update(rng.integers(16, 236, plane.buffer_size, dtype=np.uint8).tobytes())
    frame.colorspace, frame.color_range = colorspace, color_range
    frame.time_base = Fraction(1, 25)
    return frame
