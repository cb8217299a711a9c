"""Launch parameters of the kernels for given shapes: entry, grid, block and int32 arguments.

Every kernel takes its input pointers, then `integers`, then the output pointer: the order that TensorRT's
AOT plugins use. A float is passed as the int32 of the same bits, so that one cubin serves every setting.

Legend: B batch, C channels, R RoIs, S output size; G rows of M boxes; N masks of M x M cells.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from comask.errors import KernelError

# The kernels' source files, without their suffix.
ROI_ALIGN = "pyramid_roi_align"
NMS = "sorted_nms"
FRAME = "frame_to_canvas"
MASKS = "paste_masks"

# The strides of the maps that RoIs are pooled from, by the names of the graphs' tensors.
LEVEL_STRIDES: Mapping[str, int] = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}

# pyramid_roi_align.cu has the same values.
MAX_SAMPLES = 128  # S × sampling ratio
CHANNEL_BYTES = 256  # one block pools this many bytes of a pixel's channels
THREADS = 128
# sorted_nms.cu has the same values.
MAX_THREADS = 1024
KEEP_THREADS = 256
MAX_BOXES = 8192  # M of nms_keep
TILE = 32
# frame_to_canvas.cu has the same values.
FRAME_THREADS, TILE_ROWS, TILE_COLUMNS = 256, 16, 128
COLOUR_SHIFT = 16
# paste_masks.cu has the same values.
MASK_THREADS = 256
MAX_CELLS = 56  # M

# A launch that pastes has about this many blocks, since masks differ, each of at least this many pixels.
PASTE_BLOCKS, PASTE_PIXELS = 1600, 8192
INT32_MAX = 2**31 - 1

Size: TypeAlias = tuple[int, int]  # (height, width) in pixels
Matrix = Literal["bt601", "bt709", "bt2020"]
# (Kr, Kb), the shares of red and blue in Y: ITU-T H.273, table 4 (BT.2020: non-constant luminance)
LUMA_SHARES: Mapping[str, tuple[float, float]] = {
    "bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593),
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Grid and block have one dimension. A launch with an empty grid does nothing.
    """

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
    """Returns the launch of `PyramidRoiAlign(p2, p3, p4, p5, rois) → pooled`.

    Maps and output are f32 or f16. Their layout is [B, C, H, W] and [R, C, S, S], or channels-last,
    [B, H, W, channel_stride] and [R, S, S, channel_stride]. Channels from C on are padding, which is 0 in
    the output. RoIs are f32 `xyxy` in pixels of the image.

    Args:
        map_shapes: the shapes (B, C, H, W) of P2..P5.
        num_rois: R, the number of all RoIs.
        rois_per_image: if above 0, a RoI is a row of 4, and RoI i belongs to image i // rois_per_image.
            If 0, a RoI is a row of 5 that begins with the index of its image; a RoI with an unknown
            index gives zeros.
        output_size: S, the number of bins per side.
        sampling_ratio: samples per bin and axis.
        canonical_size: the side in pixels of a RoI that is pooled from P4.
        half: whether maps and output are f16.
        channels_last: whether maps and output are channels-last.
        channel_stride: elements from one pixel to the next, at least C; C if None.

    Raises:
        KernelError: when the kernel does not support these arguments.
    """
    batch, channels = map_shapes[0][:2]
    stride = channels if channel_stride is None else channel_stride
    if len(map_shapes) != 4 or any(tuple(s[:2]) != (batch, channels) for s in map_shapes):
        raise KernelError(
            f"PyramidRoiAlign got maps of shapes {[tuple(s) for s in map_shapes]}; expected P2..P5, "
            "four maps (B, C, H, W) with the same B and C"
        )
    if min(min(shape[1:]) for shape in map_shapes) < 1 or (batch < 1 and num_rois > 0):
        raise KernelError(f"PyramidRoiAlign got an empty map: {[tuple(s) for s in map_shapes]}")
    if channels_last and max(shape[3] for shape in map_shapes) * stride > INT32_MAX:
        raise KernelError("PyramidRoiAlign takes maps with rows of fewer than 2^31 elements")
    if output_size < 1 or sampling_ratio < 1 or output_size * sampling_ratio > MAX_SAMPLES:
        raise KernelError(
            f"PyramidRoiAlign got output_size={output_size} and sampling_ratio={sampling_ratio}; "
            f"both must be at least 1, and their product at most {MAX_SAMPLES}"
        )
    if rois_per_image and num_rois != batch * rois_per_image:
        raise KernelError(
            f"PyramidRoiAlign got {num_rois} RoIs; expected {batch * rois_per_image}, "
            f"{rois_per_image} for each of {batch} images"
        )
    if stride < channels or (stride != channels and not channels_last):
        raise KernelError(
            f"PyramidRoiAlign got channel_stride={stride} for {channels} channels; expected at least "
            "that number, and exactly that number unless the maps are channels-last"
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
    """Returns the launch of `SortedNms(boxes [G, M, 4] f32, group_ids [G, M] i32) → keep [G, M] bool`.

    Args:
        rows: G, the number of rows.
        boxes: M, the number of boxes per row.
        iou_threshold: a box is dropped when its IoU with a kept box of its group exceeds this; 0..1.

    Raises:
        KernelError: when the threshold is not in 0..1, or the work exceeds one launch.
    """
    if not 0 <= iou_threshold <= 1:
        raise KernelError(f"SortedNms got iou_threshold={iou_threshold}; it must be in 0..1")
    block = min(MAX_THREADS, max(THREADS, -(-boxes // TILE) * TILE))
    integers = (rows, boxes, float_bits(float32_below(iou_threshold)))
    return Launch(NMS, NMS, _grid(rows), block, integers)


def nms_overlaps_launch(rows: int, boxes: int, iou_threshold: float) -> Launch:
    """Returns the first half of `nms_launch`, `NmsOverlaps(boxes, group_ids) → words [G, T, M] i32`.

    T is M / 32, rounded up. Bit i of words[g, t, j] says that box 32·t + i would suppress box j, which
    comes after it. Words with 32·t > j are not written.
    """
    tiles = -(-boxes // TILE)
    pairs = _grid(rows * (tiles * (tiles + 1) // 2))
    integers = nms_launch(rows, boxes, iou_threshold).integers
    return Launch(NMS, "nms_overlaps", pairs, TILE, integers)


def nms_keep_launch(rows: int, boxes: int) -> Launch:
    """Returns the second half of `nms_launch`, `NmsKeep(words [G, T, M] i32) → keep [G, M] bool`."""
    if boxes > MAX_BOXES:
        raise KernelError(f"NMS of {boxes} boxes per row; NmsKeep takes at most {MAX_BOXES}")
    return Launch(NMS, "nms_keep", _grid(rows), KEEP_THREADS, (rows, boxes))


def rgb_to_canvas_launch(
    frame_size: Size,
    strides: tuple[int, int, int],
    resized_size: Size,
    canvas_size: Size,
    *,
    order: Literal["rgb", "bgr"] = "rgb",
) -> Launch:
    """Returns the launch of `frame_to_canvas_rgb(pixels) → canvas`, for packed and planar frames.

    The canvas is u8 [H, W, 3] RGB. It holds the resized frame at the top left and zeros elsewhere. Each
    byte equals that of `comask.preprocess.prepare`.

    Args:
        frame_size: the frame's size.
        strides: bytes from one row, column and channel to the next, of any sign: (pitch, 3, 1) for
            packed pixels, (pitch, 1, bytes per plane) for planes.
        resized_size: the result of `comask.preprocess.resized_shape`.
        canvas_size: the result of `comask.preprocess.padded_shape`.
        order: the order of the frame's channels.

    Raises:
        KernelError: when the kernel does not support these sizes or strides.
    """
    _check_sizes(frame_size, resized_size, canvas_size)
    row, column, channel = strides
    if max(abs(row), abs(column), abs(2 * channel)) > INT32_MAX:
        raise KernelError(f"a frame has strides {list(strides)}; expected strides below 2^30")
    red, blue = (0, 2 * channel) if order == "rgb" else (2 * channel, 0)
    integers = (row, column, red, channel, blue)
    return _frame_launch("rgb", frame_size, resized_size, canvas_size, integers)


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
    """Returns the launch of `frame_to_canvas_nv12(luma, chroma) → canvas`.

    Luma is u8 [h, pitch]; chroma is u8 [ch, pitch], pairs of U and V. Two rows and two columns share one
    pair, without interpolation between pairs, as in the converters of swscale and OpenCV and in NVIDIA's
    samples. Each pixel of the frame is rounded to u8 RGB before the resize, so that the result equals
    that of a separate conversion.

    Args:
        frame_size: the luma plane's size.
        chroma_size: rows and columns of pairs: half of `frame_size`. An odd length is rounded up, as in
            FFmpeg, or down; then the last row or column uses the pair before it.
        pitches: bytes from one row to the next, of luma and chroma.
        resized_size: the result of `comask.preprocess.resized_shape`.
        canvas_size: the result of `comask.preprocess.padded_shape`.
        matrix: the colour matrix.
        full_range: whether Y, U and V use 0..255. Otherwise Y uses 16..235, U and V use 16..240.

    Raises:
        KernelError: when the kernel does not support these sizes, pitches or this matrix.
    """
    _check_sizes(frame_size, resized_size, canvas_size)
    for length, halved in zip(frame_size, chroma_size, strict=True):
        if halved < 1 or halved not in (length // 2, (length + 1) // 2):
            raise KernelError(
                f"NV12 of {list(frame_size)} pixels has chroma of {list(chroma_size)} pairs; expected "
                f"half of the size, rounded up or down, and at least 1"
            )
    if pitches[0] < frame_size[1] or pitches[1] < 2 * chroma_size[1]:
        raise KernelError(
            f"NV12 rows of {frame_size[1]} and {2 * chroma_size[1]} bytes have pitches {list(pitches)}; "
            "expected pitches of at least as many bytes"
        )
    if matrix not in LUMA_SHARES:
        raise KernelError(f"unknown colour matrix {matrix!r}; expected {', '.join(LUMA_SHARES)}")
    coefficients = colour_coefficients(matrix, full_range=full_range)
    integers = (*pitches, *chroma_size, *coefficients)
    return _frame_launch("nv12", frame_size, resized_size, canvas_size, integers)


def _frame_launch(
    format: str, frame: Size, resized: Size, canvas: Size, integers: tuple[int, ...]
) -> Launch:
    # The inverse of destination / source, as in OpenCV: source / destination may round differently.
    scales = (1 / (to / of) for to, of in zip(resized, frame, strict=True))
    halves = struct.unpack("<4i", struct.pack("<2d", *scales))
    grid = _grid(-(-canvas[0] // TILE_ROWS) * -(-canvas[1] // TILE_COLUMNS))
    integers = (*frame, *resized, *canvas, *halves, *integers)
    return Launch(FRAME, f"{FRAME}_{format}", grid, FRAME_THREADS, integers)


def colour_coefficients(matrix: Matrix, *, full_range: bool) -> tuple[int, ...]:
    """Returns black's Y, then 2^16 × the factors of Y, V in red, U and V in green, and U in blue."""
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
            f"{list(canvas)}; expected sizes of at least 1 and a canvas that holds the resized frame"
        )


@dataclass(frozen=True)
class MaskLaunches:
    """The launches of `paste_masks.cu`, which paste masks into an image.

    All of them take mask_probs f32 [N, M, M], probabilities over the boxes, and boxes f32 [N, 4], `xyxy`
    in pixels of the resized image. They paste into the image before it was resized; every pixel equals
    that of `comask.masks.paste_masks`. `found` i32 [1] says how many of the N rows hold masks.

    Attributes:
        masks: N, the number of masks.
        cells: M, the number of cells per side.
        image_size: (H, W) in pixels.
        threshold: a pixel belongs to the mask when its probability is at least this.
        scale: (y, x), resized pixels per pixel of the image.

    Raises:
        KernelError: when the kernels do not support these sizes or this threshold.
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
                f"masks have {cells} x {cells} cells; expected 1 to {MAX_CELLS} per side"
            )
        if min(height, width) < 1 or max(height * width, masks * (width + 1)) > INT32_MAX:
            raise KernelError(
                f"{masks} masks in an image of {height} x {width}; expected at most 2^31 - 1 pixels per "
                "image, and at most as many columns of all masks together"
            )
        if not self.threshold > 0:
            raise KernelError(f"mask threshold {self.threshold}; expected a number above 0")

    def edge_counts(self) -> Launch:
        """Returns the launch of `mask_edge_counts(mask_probs, boxes, found) → counts`.

        This is the first step to COCO's RLE. An edge is a place at which a walk over the image, column by
        column, enters or leaves the mask. `counts` is i32 [N + N·W]: first each mask's number of edges,
        then for each mask and column the number of edges up to the column's end.
        """
        return self._launch("mask_edge_counts", self.masks)

    def edges(self, capacity: int) -> Launch:
        """Returns the launch of `mask_edges(mask_probs, boxes, counts) → edges` i32 [capacity].

        This is the second step. It gives the edges of mask 0, then of mask 1 and so on, each mask's in
        rising order as column · H + row: what `comask.segmentation.rles_from_edges` takes. Edges beyond
        the capacity are left out; `counts` has their full number. A compact mask has about two edges per
        column.
        """
        return self._launch("mask_edges", self.masks, capacity)

    def bitmaps(self) -> Launch:
        """Returns the launch of `paste_masks(mask_probs, boxes, found) → bitmaps`.

        The bitmaps are u8 [N, H, W], 1 inside the mask.
        """
        most = self.image_size[0] * self.image_size[1] // PASTE_PIXELS
        strips = max(1, min(most, -(-PASTE_BLOCKS // max(1, self.masks))))
        return self._launch("paste_masks", self.masks * strips, strips)

    def _launch(self, entry: str, grid: int, *last: int) -> Launch:
        y_scale, x_scale = self.scale
        floats = (float_bits(value) for value in (x_scale, y_scale, self.threshold))
        integers = (self.masks, self.cells, *self.image_size, *floats, *last)
        return Launch(MASKS, entry, grid, MASK_THREADS, integers)


def pack(launch: Launch, inputs: Sequence[int], output: int) -> ctypes.Array[ctypes.c_void_p]:
    """Returns pointers to a kernel's arguments, as cuLaunchKernel and the host entries take them."""
    values: list[ctypes.c_void_p | ctypes.c_int32] = [ctypes.c_void_p(i) for i in inputs]
    values += [ctypes.c_int32(i) for i in launch.integers]
    values.append(ctypes.c_void_p(output))
    packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    packed.values = values  # type: ignore[attr-defined]  # keeps them alive with the pointers
    return packed


def float_bits(value: float) -> int:
    """Returns the bits of the nearest f32 as an int32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)


def float32_below(threshold: float) -> float:
    """Returns the largest f32 that does not exceed `threshold`, which must be 0 or more.

    torchvision compares an f32 IoU with an f64 threshold. `iou > float32_below(t)` in f32 gives the
    same answers. Rounding 0.3 up to the nearest f32 would change the answer for an IoU of exactly that
    f32.
    """
    bits = float_bits(threshold)
    (nearest,) = struct.unpack("<f", struct.pack("<i", bits))
    if nearest > threshold:
        (nearest,) = struct.unpack("<f", struct.pack("<i", bits - 1))
    return float(nearest)


def _grid(blocks: int) -> int:
    if blocks > INT32_MAX:
        raise KernelError(f"a kernel got {blocks} blocks of work; a launch takes at most 2^31 - 1")
    return blocks
