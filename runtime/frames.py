"""Video frames in other libraries' memory: packed or planar RGB and BGR, and NV12, all u8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from comask.errors import ImageError
from comask.kernels.launch import (
    COLOUR_SHIFT,
    LUMA_SHARES,
    Launch,
    Matrix,
    Size,
    colour_coefficients,
    nv12_to_canvas_launch,
    rgb_to_canvas_launch,
)
from comask.runtime.dlpack import Borrowed, borrow

Format: TypeAlias = Literal["rgb", "bgr", "nv12"]
FORMATS = get_args(Format)


@dataclass(frozen=True)
class Coding:
    """The meaning of a frame's bytes.

    Attributes:
        format: see `FORMATS`.
        matrix: the matrix of NV12's colours.
        full_range: whether NV12's Y, U and V use 0..255.

    Raises:
        ImageError: if the format or the matrix is unknown.
    """

    format: Format
    matrix: Matrix
    full_range: bool

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ImageError(
                f"unknown frame format {self.format!r}; expected one of {', '.join(FORMATS)}"
            )
        if self.matrix not in LUMA_SHARES:
            raise ImageError(
                f"unknown colour matrix {self.matrix!r}; expected one of {', '.join(LUMA_SHARES)}"
            )


@dataclass(frozen=True)
class Frame:
    """A frame in the caller's memory.

    Attributes:
        planes: one of u8 [h, w, 3] or [3, h, w]; for NV12, Y [h, w] and UV [ch, cw, 2] or [ch, 2·cw].
        coding: the meaning of its bytes.

    Raises:
        ImageError: if the planes have other shapes or types, or lie on different devices.
    """

    planes: tuple[Borrowed, ...]
    coding: Coding

    def __post_init__(self) -> None:
        shapes = [plane.shape for plane in self.planes]
        if self.coding.format == "nv12":
            good = (
                len(shapes) == 2
                and len(shapes[0]) == 2
                and (len(shapes[1]) == 2 or shapes[1][2:] == (2,))
                and all(plane.strides[-1] == 1 for plane in self.planes)
                and self.planes[1].strides[1:] in ((1,), (2, 1))
                and all(
                    half >= 1 and half in (n // 2, (n + 1) // 2)
                    for n, half in zip(shapes[0], self._chroma_size, strict=True)
                )
            )
        else:
            good = len(shapes) == 1 and len(shapes[0]) == 3 and 3 in (shapes[0][2], shapes[0][0])
        good = good and all(p.dtype == np.uint8 and min(p.shape) > 0 for p in self.planes)
        if not good:
            found = ", ".join(f"{plane.dtype} {list(plane.shape)}" for plane in self.planes)
            raise ImageError(
                f"{self.coding.format} frame of {found}; expected u8 [h, w, 3] or [3, h, w], for nv12 a "
                "pair of Y [h, w] and UV [h/2, w/2, 2] or both in one [3/2·h, w], with rows without gaps "
                "between bytes"
            )
        if len({plane.device for plane in self.planes}) > 1:
            raise ImageError("the planes of a frame are on different devices; expected one")

    @property
    def device(self) -> int | None:
        """Index of the GPU in whose memory the frame lies; None for the host."""
        return self.planes[0].device

    @property
    def size(self) -> Size:
        """(h, w) in pixels."""
        shape = self.planes[0].shape
        return (shape[1], shape[2]) if self._planar else (shape[0], shape[1])

    @property
    def _planar(self) -> bool:
        return self.coding.format != "nv12" and self.planes[0].shape[2] != 3

    @property
    def _chroma_size(self) -> Size:
        shape = self.planes[1].shape
        return shape[0], shape[1] if len(shape) == 3 else shape[1] // 2

    def launch(self, resized: Size, canvas: Size) -> tuple[Launch, list[int]]:
        """Returns the launch of the kernel that resizes the frame to a canvas, and the kernel's inputs.

        Raises:
            KernelError: if the kernel does not support these sizes or strides.
        """
        addresses = [plane.address for plane in self.planes]
        if self.coding.format == "nv12":
            luma, chroma = self.planes
            launch = nv12_to_canvas_launch(
                self.size, self._chroma_size, (luma.strides[0], chroma.strides[0]), resized, canvas,
                matrix=self.coding.matrix, full_range=self.coding.full_range,
            )  # fmt: skip
            return launch, addresses
        first, second, third = self.planes[0].strides
        strides = (second, third, first) if self._planar else (first, second, third)
        return rgb_to_canvas_launch(
            self.size, strides, resized, canvas, order=self.coding.format
        ), addresses  # fmt: skip

    def pixels(self) -> NDArray[np.uint8]:
        """Returns a frame on the host as u8 [h, w, 3] RGB; NV12 with the kernel's arithmetic."""
        planes: list[NDArray[np.uint8]] = [np.asarray(plane) for plane in self.planes]
        if self.coding.format != "nv12":
            image = planes[0].transpose(1, 2, 0) if self._planar else planes[0]
            return np.ascontiguousarray(image if self.coding.format == "rgb" else image[:, :, ::-1])
        chroma_height, chroma_width = self._chroma_size
        rows = np.minimum(np.arange(self.size[0]) // 2, chroma_height - 1)
        columns = np.minimum(np.arange(self.size[1]) // 2, chroma_width - 1)
        pairs = planes[1].reshape(chroma_height, -1)[:, : 2 * chroma_width]
        shared = pairs.reshape(chroma_height, chroma_width, 2)[rows[:, None], columns]
        u, v = (shared[:, :, i].astype(np.int32) - 128 for i in (0, 1))
        black, gain, red_v, green_u, green_v, blue_u = colour_coefficients(
            self.coding.matrix, full_range=self.coding.full_range
        )
        y = (planes[0].astype(np.int32) - black) * gain + (1 << (COLOUR_SHIFT - 1))
        channels = (y + red_v * v, y + green_u * u + green_v * v, y + blue_u * u)
        return np.stack([np.clip(c >> COLOUR_SHIFT, 0, 255) for c in channels], 2).astype(np.uint8)

    def require_on(self, gpu: int | None) -> None:
        """Checks that the frame is on the host or on a predictor's GPU, given by its index.

        Raises:
            ImageError: if it is on another GPU.
        """
        if self.device not in (None, gpu):
            raise ImageError(
                f"a frame is on GPU {self.device}, this predictor on GPU {gpu}; "
                f"load one with device={self.device}"
            )

    def release(self) -> None:
        """Releases the caller's memory."""
        for plane in self.planes:
            plane.release()


def borrow_frame(source: Any, stream: int, coding: Coding) -> Frame:
    """Borrows a frame of the caller.

    Args:
        source: an array of another library; for NV12, of Y with UV below, or a (Y, UV) pair. See
            `borrow`.
        stream: our stream, which waits for the producer's work; see `borrow`.
        coding: the meaning of its bytes.

    Raises:
        ImageError: if it is not such a frame.
    """
    sources = source if isinstance(source, tuple) else (source,)
    planes = tuple(borrow(plane, stream) for plane in sources)
    if coding.format == "nv12" and len(planes) == 1:
        planes = _nv12_planes(planes[0])
    return Frame(planes, coding)


def _nv12_planes(whole: Borrowed) -> tuple[Borrowed, Borrowed]:
    """Splits one buffer, [3/2·h, w] apart from axes of length 1, into Y and UV.

    Raises:
        ImageError: if it is not such a buffer with even height and width.
    """
    axes = [axis for axis in zip(whole.shape, whole.strides, strict=True) if axis[0] != 1]
    if len(axes) != 2 or axes[0][0] % 3 or axes[1][0] % 2:
        raise ImageError(
            f"nv12 frame of {whole.dtype} {list(whole.shape)}; expected u8 [3/2·h, w] with h and w even, "
            "or a pair of Y and UV, which may be odd"
        )
    (rows, pitch), (width, step) = axes
    height = rows // 3 * 2
    luma = whole.view(0, (height, width), (pitch, step))
    return luma, whole.view(height * pitch, (rows - height, width), (pitch, step))
