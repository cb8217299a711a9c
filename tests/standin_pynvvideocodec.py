"""Stands in for PyNvVideoCodec: its signatures, orders and pool of buffers, with PyAV as the decoder.

Signatures are those of the wheel 2.2.4, of its Python files and its extension's docstrings. As there,
frames are written by work on `cuda_stream`, `__dlpack__` makes the consumer's stream wait for the event
of that one frame, and `get_batch_frames` takes the frames of the call before back, whoever holds them.
"""

from __future__ import annotations

import ctypes
import enum
import math
from collections import deque
from collections.abc import Iterator

import av
import numpy as np
from numpy.typing import NDArray

from comask.runtime.device import open_device
from comask.runtime.dlpack import HostMemory, SharedArray

eager = False  # whether the decoder's stream runs at once; otherwise when somebody waits for it


class OutputColorType(enum.IntEnum):
    NATIVE, RGB, RGBP = range(3)


class HostFrame:
    """A buffer of the pool on the host."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._pixels = np.zeros(shape, np.uint8)
        self._shared = HostMemory({"": self._pixels}).shared()[""]

    def write(self, pixels: NDArray[np.uint8], stream: int) -> None:
        self._pixels[...] = pixels

    def __dlpack__(self, stream: int = 0) -> object:
        return self._shared.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._shared.__dlpack_device__()

    def free(self, stream: int) -> None:
        """Nothing of its own."""


class GpuFrame:
    """A buffer of the pool on the GPU, and the event of what was last written there."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._event, self._gpu = ctypes.c_void_p(), open_device()
        self._sources: list[NDArray[np.uint8]] = []  # each is read when the stream gets there
        with self._gpu:
            self._memory = self._gpu.memory(math.prod(shape))
            call("cuEventCreate", ctypes.byref(self._event), 0)
        self._shared = SharedArray(self._memory.address, shape, np.dtype(np.uint8), 0, self)

    def write(self, pixels: NDArray[np.uint8], stream: int) -> None:
        self._sources.append(pixels)
        with self._gpu:
            call(
                "cuMemcpyHtoDAsync_v2", ctypes.c_void_p(self._memory.address),
                ctypes.c_void_p(pixels.ctypes.data), ctypes.c_size_t(pixels.nbytes),
                ctypes.c_void_p(stream),
            )  # fmt: skip
            call("cuEventRecord", self._event, ctypes.c_void_p(stream))
            if eager:
                call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def __dlpack__(self, stream: int = 0) -> object:
        if stream == 0:
            raise RuntimeError("Passed value of 0 which is not allowed")
        return self._shared.__dlpack__(stream=stream)

    def share(self, stream: int) -> None:
        """For the shared array: lets a consumer's stream wait."""
        call("cuStreamWaitEvent", ctypes.c_void_p(stream), self._event, 0)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._shared.__dlpack_device__()

    def free(self, stream: int) -> None:
        with self._gpu:
            call("cuStreamSynchronize", ctypes.c_void_p(stream))  # as the real cuMemFree does
            call("cuEventDestroy_v2", self._event)
            self._memory.free()


def call(name: str, *arguments: object) -> None:
    """Calls a function of the driver, which must succeed."""
    assert getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments) == 0, name


class ThreadedDecoder:
    def __init__(
        self,
        enc_file_path: str,
        buffer_size: int,
        gpu_id: int = 0,
        cuda_context: int = 0,
        cuda_stream: int = 0,
        use_device_memory: bool = True,
        max_width: int = 0,
        max_height: int = 0,
        need_scanned_stream_metadata: bool = False,
        decoder_cache_size: int = 4,
        output_color_type: OutputColorType = OutputColorType.NATIVE,
        start_frame: int = 0,
        enableDecodeStats: bool = False,  # noqa: N803
    ) -> None:
        assert isinstance(enc_file_path, str)  # its C++ takes nothing else
        assert output_color_type == OutputColorType.NATIVE, "others are not stood in for"
        assert bool(cuda_stream) == use_device_memory, "the default stream is not stood in for"
        self.buffer_size, self._stream = buffer_size, cuda_stream
        self._pictures = self._decode(enc_file_path)
        self._new_frame = GpuFrame if use_device_memory else HostFrame
        self._pool: list[GpuFrame | HostFrame] = []
        self._free: list[GpuFrame | HostFrame] = []
        self._ready: deque[GpuFrame | HostFrame] = deque()
        self._given: list[GpuFrame | HostFrame] = []
        self._decode_ahead()

    @staticmethod
    def _decode(path: str) -> Iterator[NDArray[np.uint8]]:
        with av.open(path) as container:
            for frame in container.decode(video=0):
                yield frame.reformat(format="nv12").to_ndarray()  # [3/2·h, w]

    def _decode_ahead(self) -> None:
        while len(self._ready) < self.buffer_size:
            pixels = next(self._pictures, None)
            if pixels is None:
                return
            if not self._free:
                self._free.append(self._new_frame(pixels.shape))
                self._pool += self._free
            frame = self._free.pop()
            frame.write(pixels, self._stream)
            self._ready.append(frame)

    def get_batch_frames(self, batch_size: int) -> list[GpuFrame | HostFrame]:
        if batch_size > self.buffer_size:
            raise Exception("batch_size cannot be greater than buffer_size")
        self._free += self._given
        self._given = [self._ready.popleft() for _ in range(min(batch_size, len(self._ready)))]
        self._decode_ahead()
        return self._given

    def end(self) -> None:
        for frame in self._pool:
            frame.free(self._stream)
        self._pool = []
