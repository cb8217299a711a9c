"""How the kernel that makes the network's canvas from a frame of video is launched.

The canvas is u8 [H, W, 3] RGB: the frame resized as `comask.preprocess.prepare` does at the top left,
zeros elsewhere. For frames of RGB it is the same bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from comask.errors import KernelError
from comask.kernels.launch import INT32_MAX, Launch

FRAME = "frame_to_canvas"  # name of the source

# As in frame_to_canvas.cu.
THREADS = 256
COLOUR_SHIFT = 16

Size: TypeAlias = tuple[int, int]  # (height, width) in pixels
Matrix = Literal["bt601", "bt709", "bt2020"]
# (Kr, Kb), the shares of red and blue in Y: ITU-T H.273, table 4 (BT.2020: non-constant luminance)
LUMA_SHARES: Mapping[str, tuple[float, float]] = {
    "bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593),
}  # fmt: skip


def rgb_to_canvas_launch(
    frame_size: Size,
    strides: tuple[int, int, int],
    resized_size: Size,
    canvas_size: Size,
    *,
    order: Literal["rgb", "bgr"] = "rgb",
) -> Launch:
    """`frame_to_canvas_rgb(pixels) → canvas`, for packed and planar frames alike.

    Args:
        frame_size: of the frame.
        strides: bytes from one row, column and channel to the next, of any sign: (pitch, 3, 1) for
            packed pixels, (pitch, 1, bytes of a plane) for planes.
        resized_size: `comask.preprocess.resized_shape`.
        canvas_size: `comask.preprocess.padded_shape`.
        order: of the channels.

    Raises:
        KernelError: the kernel cannot do it.
    """
    _check_sizes(frame_size, resized_size, canvas_size)
    row, column, channel = strides
    if max(abs(row), abs(column), abs(2 * channel)) > INT32_MAX:
        raise KernelError(f"a frame has strides {list(strides)}; the kernel takes less than 2^30")
    red, blue = (0, 2 * channel) if order == "rgb" else (2 * channel, 0)
    integers = (*frame_size, *resized_size, *canvas_size, row, column, red, channel, blue)
    return Launch(FRAME, f"{FRAME}_rgb", canvas_size[0], THREADS, integers)


def nv12_to_canvas_launch(
    frame_size: Size,
    chroma_size: Size,
    pitches: tuple[int, int],
    resized_size: Size,
    canvas_size: Size,
    *,
    matrix: Matrix,
    full_range: bool,
) -> Launch:
    """`frame_to_canvas_nv12(luma, chroma) → canvas`.

    Luma is u8 [h, pitch]; chroma is u8 [ch, pitch], pairs of U and V. Every two rows and columns take
    the pair they share, not one interpolated between pairs: so do swscale's and OpenCV's converters and
    NVIDIA's samples. Each pixel of the frame is rounded to u8 RGB before the resize, as it is where a
    frame is converted first.

    Args:
        frame_size: of the luma.
        chroma_size: of the pairs, half the luma's; for an odd length rounded up, as FFmpeg has it, or
            down, when the last row or column takes the pair before it.
        pitches: bytes from one row to the next, of luma and chroma.
        resized_size: `comask.preprocess.resized_shape`.
        canvas_size: `comask.preprocess.padded_shape`.
        matrix: of the colours.
        full_range: Y, U and V use 0..255, else Y 16..235, U and V 16..240.

    Raises:
        KernelError: the kernel cannot do it.
    """
    _check_sizes(frame_size, resized_size, canvas_size)
    for length, halved in zip(frame_size, chroma_size, strict=True):
        if halved < 1 or halved not in (length // 2, (length + 1) // 2):
            raise KernelError(
                f"NV12 of {list(frame_size)} pixels has chroma of {list(chroma_size)} pairs; expected "
                f"half of the size, rounded up or down, and one at least"
            )
    if pitches[0] < frame_size[1] or pitches[1] < 2 * chroma_size[1]:
        raise KernelError(
            f"NV12 rows of {frame_size[1]} and {2 * chroma_size[1]} bytes have pitches {list(pitches)}; "
            "expected at least as many bytes"
        )
    if matrix not in LUMA_SHARES:
        raise KernelError(f"no colour matrix {matrix!r}; known are {', '.join(LUMA_SHARES)}")
    integers = (
        *frame_size, *resized_size, *canvas_size, *pitches, *chroma_size,
        *colour_coefficients(matrix, full_range=full_range),
    )  # fmt: skip
    return Launch(FRAME, f"{FRAME}_nv12", canvas_size[0], THREADS, integers)


def colour_coefficients(matrix: Matrix, *, full_range: bool) -> tuple[int, ...]:
    """Black's Y, then 2^16 × the factors of Y, V in red, U and V in green, and U in blue."""
    red, blue = LUMA_SHARES[matrix]
    green = 1 - red - blue
    black, luma, chroma = (0, 1.0, 1.0) if full_range else (16, 255 / 219, 255 / 224)
    of_v, of_u = 2 * (1 - red) * chroma, 2 * (1 - blue) * chroma
    factors = (luma, of_v, -of_u * blue / green, -of_v * red / green, of_u)
    return (black, *(round(factor * 2**COLOUR_SHIFT) for factor in factors))


def _check_sizes(frame: Size, resized: Size, canvas: Size) -> None:
    if min(*frame, *resized) < 1 or resized[0] > canvas[0] or resized[1] > canvas[1]:
        raise KernelError(
            f"a frame of {list(frame)} pixels cannot become {list(resized)} on a canvas of "
            f"{list(canvas)}; sizes are at least 1, and the canvas at least as large as the resized frame"
        )
