"""How each kernel is launched for given shapes: its entry, grid, block and int32 arguments.

Every kernel takes its input pointers, then `integers`, then the output pointer, the order of TensorRT's
AOT plugins. Floats travel as the int32 of their bits, so one cubin serves every setting.

Legend: B batch, C channels, R RoIs, S output size; G rows of M boxes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from comask.errors import KernelError

ROI_ALIGN = "pyramid_roi_align"  # names of sources
NMS = "sorted_nms"

# As in pyramid_roi_align.cu.
MAX_SAMPLES = 128  # S × sampling ratio
CHANNEL_BYTES = 256  # a block's share of a pixel
THREADS = 128
# As in sorted_nms.cu.
MAX_THREADS = 1024

INT32_MAX = 2**31 - 1


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
