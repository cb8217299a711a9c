"""How each kernel is launched for given shapes: its entry, grid, block and int32 arguments.

Every kernel takes its input pointers, then `integers`, then the output pointer, the order of TensorRT's
AOT plugins. Floats travel as the int32 of their bits, so one cubin serves every setting.

Legend: B batch, C channels, R RoIs, S output size; G rows of M boxes; N masks of M x M cells.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from comask.errors import KernelError

ROI_ALIGN = "pyramid_roi_align"  # names of sources
NMS = "sorted_nms"
FRAME = "frame_to_canvas"
MASKS = "paste_masks"

# Of the maps that RoIs are pooled from, by the names of the graphs' tensors.
LEVEL_STRIDES: Mapping[str, int] = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}

# As in pyramid_roi_align.cu.
MAX_SAMPLES = 128  # S × sampling ratio
CHANNEL_BYTES = 256  # a block's share of a pixel
THREADS = 128
# As in sorted_nms.cu.
MAX_THREADS = 1024
# As in frame_to_canvas.cu.
FRAME_THREADS = 256
COLOUR_SHIFT = 16
# As in paste_masks.cu.
MASK_THREADS = 128
MAX_CELLS = 56  # M

STRIPS = 8  # blocks that share a bitmap
INT32_MAX = 2**31 - 1

Size: TypeAlias = tuple[int, int]  # (height, width) in pixels
Matrix = Literal["bt601", "bt709", "bt2020"]
# (Kr, Kb), the shares of red and blue in Y: ITU-T H.273, table 4 (BT.2020: non-constant luminance)
LUMA_SHARES: Mapping[str, tuple[float, float]] = {
    "bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593),
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; grid and block have one dimension, and an empty grid launches nothing."""

    source: str
    entry: str
    grid: int
    block: int
    integers: tuple[int, ...]


def roi_align_launch(
    map_shapes: Sequence[Sequence[int]],
    num_rois: int,
    rois_per_image: int,
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
    *,
    half: bool,
    channels_last: bool,
    channel_stride: int | None = None,
) -> Launch:
    """`PyramidRoiAlign(p2, p3, p4, p5, rois) → pooled`.

    Maps and output are f32 or f16, [B, C, H, W] and [R, C, S, S], or channels-last
    [B, H, W, channel_stride] and [R, S, S, channel_stride], where channels from C on are padding (0 in
    the output). RoIs are f32 `xyxy` in pixels of the image.

    Args:
        map_shapes: (B, C, H, W) of P2..P5.
        num_rois: R.
        rois_per_image: RoI i, a row of 4, is of image i // rois_per_image; 0: each is a row of 5 whose
            first number is its image, and one of no image gives zeros.
        output_size: S.
        sampling_ratio: samples a bin and axis.
        canonical_size: side in pixels of a RoI that is pooled from P4.
        half: maps and output are f16.
        channels_last: their layout.
        channel_stride: elements from one pixel to the next, at least C; C if None.

    Raises:
        KernelError: the kernel cannot do it.
    """
    batch, channels = map_shapes[0][:2]
    stride = channels if channel_stride is None else channel_stride
    if len(map_shapes) != 4 or any(tuple(s[:2]) != (batch, channels) for s in map_shapes):
        raise KernelError(
            f"PyramidRoiAlign got maps of shapes {[tuple(s) for s in map_shapes]}; it takes P2..P5 "
            "as four (B, C, H, W) of one B and C"
        )
    if min(min(shape[1:]) for shape in map_shapes) < 1 or (batch < 1 and num_rois > 0):
        raise KernelError(f"PyramidRoiAlign got an empty map: {[tuple(s) for s in map_shapes]}")
    if channels_last and max(shape[3] for shape in map_shapes) * stride > INT32_MAX:
        raise KernelError("PyramidRoiAlign takes maps with rows of less than 2^31 elements")
    if output_size < 1 or sampling_ratio < 1 or output_size * sampling_ratio > MAX_SAMPLES:
        raise KernelError(
            f"PyramidRoiAlign got output_size={output_size} and sampling_ratio={sampling_ratio}; "
            f"both must be at least 1, and their product at most {MAX_SAMPLES}"
        )
    if rois_per_image and num_rois != batch * rois_per_image:
        raise KernelError(
            f"PyramidRoiAlign got {num_rois} RoIs; {batch} images of {rois_per_image} have "
            f"{batch * rois_per_image}"
        )
    if stride < channels or (stride != channels and not channels_last):
        raise KernelError(
            f"PyramidRoiAlign got channel_stride={stride} for {channels} channels; it must be at "
            "least their number, and equal unless the maps are channels-last"
        )
    tile = CHANNEL_BYTES // (2 if half else 4)
    sides = [side for shape in map_shapes for side in shape[2:]]
    return Launch(
        source=ROI_ALIGN,
        entry=f"{ROI_ALIGN}_{'f16' if half else 'f32'}_{'channels_last' if channels_last else 'planes'}",
        grid=_grid(num_rois * -(-stride // tile)),
        block=THREADS,
        integers=(
            batch, channels, stride, *sides, num_rois, rois_per_image, output_size, sampling_ratio,
            float_bits(canonical_size),
        ),
    )  # fmt: skip


def nms_launch(rows: int, boxes: int, iou_threshold: float) -> Launch:
    """`SortedNms(boxes [G, M, 4] f32, group_ids [G, M] i32) → keep [G, M] bool`.

    Args:
        rows: G.
        boxes: M.
        iou_threshold: a box goes when its IoU with a kept one of its group is above this; 0..1.

    Raises:
        KernelError: the kernel cannot do it.
    """
    if not 0 <= iou_threshold <= 1:
        raise KernelError(f"SortedNms got iou_threshold={iou_threshold}; it must be in 0..1")
    return Launch(
        source=NMS,
        entry=NMS,
        grid=_grid(rows),
        block=min(MAX_THREADS, max(THREADS, -(-boxes // 32) * 32)),
        integers=(rows, boxes, float_bits(float32_below(iou_threshold))),
    )


def rgb_to_canvas_launch(
    frame_size: Size,
    strides: tuple[int, int, int],
    resized_size: Size,
    canvas_size: Size,
    *,
    order: Literal["rgb", "bgr"] = "rgb",
) -> Launch:
    """`frame_to_canvas_rgb(pixels) → canvas`, for packed and planar frames alike.

    The canvas is u8 [H, W, 3] RGB: the frame resized as `comask.preprocess.prepare` does at the top left,
    zeros elsewhere. For frames of RGB it is the same bit by bit.

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
    return Launch(FRAME, f"{FRAME}_rgb", canvas_size[0], FRAME_THREADS, integers)


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
    return Launch(FRAME, f"{FRAME}_nv12", canvas_size[0], FRAME_THREADS, integers)


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


@dataclass(frozen=True)
class MaskLaunches:
    """The launches that paste masks into an image, for `paste_masks.cu`.

    All take mask_probs f32 [N, M, M], probabilities over the boxes, and boxes f32 [N, 4], `xyxy` in
    pixels of the resized image, and paste as `comask.masks.paste_masks` does, pixel by pixel, into the
    image before it was resized. `found` i32 [1] says how many of the N rows hold masks.

    Attributes:
        masks: N.
        cells: M.
        image_size: (H, W) in pixels.
        threshold: a pixel belongs to the mask when its probability is at least this.
        scale: (y, x), resized pixels a pixel of the image.

    Raises:
        KernelError: the kernels cannot do it.
    """

    masks: int
    cells: int
    image_size: Size
    threshold: float
    scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        masks, cells, (height, width) = self.masks, self.cells, self.image_size
        if not 1 <= cells <= MAX_CELLS:
            raise KernelError(
                f"masks have {cells} x {cells} cells; the kernel takes 1 to {MAX_CELLS}"
            )
        if min(height, width) < 1 or max(height * width, masks * (width + 1)) > INT32_MAX:
            raise KernelError(
                f"{masks} masks in an image of {height} x {width}: the kernel takes images with up to "
                "2^31 - 1 pixels, and as many columns in all"
            )
        if not self.threshold > 0:
            raise KernelError(f"mask threshold {self.threshold}; it must be above 0")

    def edge_counts(self) -> Launch:
        """`mask_edge_counts(mask_probs, boxes, found) → counts`, the first step to COCO's RLE.

        An edge is where a walk over the image, column by column, enters or leaves the mask. `counts` is
        i32 [N + N·W]: each mask's number of edges, then those of each mask up to the end of each column.
        """
        return self._launch("mask_edge_counts", self.masks)

    def edges(self, capacity: int) -> Launch:
        """`mask_edges(mask_probs, boxes, counts) → edges` i32 [capacity], the second step.

        Those of mask 0, of mask 1 and so on, each in rising order as column · H + row, for
        `comask.segmentation.rles_from_edges`. What exceeds the capacity is left out; `counts` says how
        many there are. A compact mask has about two a column.
        """
        return self._launch("mask_edges", self.masks, capacity)

    def bitmaps(self) -> Launch:
        """`paste_masks(mask_probs, boxes, found) → bitmaps` u8 [N, H, W], 1 inside of the mask."""
        return self._launch("paste_masks", self.masks * STRIPS, STRIPS)

    def _launch(self, entry: str, grid: int, *last: int) -> Launch:
        y_scale, x_scale = self.scale
        floats = (float_bits(value) for value in (x_scale, y_scale, self.threshold))
        integers = (self.masks, self.cells, *self.image_size, *floats, *last)
        return Launch(MASKS, entry, grid, MASK_THREADS, integers)


def pack(launch: Launch, inputs: Sequence[int], output: int) -> ctypes.Array[ctypes.c_void_p]:
    """Pointers to a kernel's arguments, as cuLaunchKernel and the host entries take them."""
    values: list[ctypes.c_void_p | ctypes.c_int32] = [ctypes.c_void_p(i) for i in inputs]
    values += [ctypes.c_int32(i) for i in launch.integers]
    values.append(ctypes.c_void_p(output))
    packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    packed.values = values  # type: ignore[attr-defined]  # alive as long as the pointers
    return packed


def float_bits(value: float) -> int:
    """The bits of the nearest f32, as an int32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)


def float32_below(threshold: float) -> float:
    """The largest f32 not above `threshold`, which must be 0 or more.

    torchvision compares an f32 IoU with an f64 threshold. `iou > float32_below(t)` in f32 gives the
    same answers; rounding 0.3 up to the nearest f32 would not, at an IoU of exactly that f32.
    """
    bits = float_bits(threshold)
    (nearest,) = struct.unpack("<f", struct.pack("<i", bits))
    if nearest > threshold:
        (nearest,) = struct.unpack("<f", struct.pack("<i", bits - 1))
    return float(nearest)


def _grid(blocks: int) -> int:
    if blocks > INT32_MAX:
        raise KernelError(f"a kernel got {blocks} blocks of work; at most 2^31 - 1 fit a launch")
    return blocks
