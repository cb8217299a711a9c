"""Compares the values, time and bandwidth of our kernels with torchvision's operators."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pixels
from clock import seconds
from context import Context
from rows import Figure, UnavailableError

if TYPE_CHECKING:
    from torch import Tensor

STRIDES = (4, 8, 16, 32)
CANONICAL = 224.0
HALF_ERROR = 4e-3  # for maps in -4..4: two roundings to half of 2^-11 each


def values_f32(context: Context) -> Figure:
    """Compares RoIAlign on planes with torchvision in float32."""
    return Figure(value=_roi_error(context, half=False, channels_last=False), most=1e-5)


def values_f32_channels_last(context: Context) -> Figure:
    """Compares RoIAlign on channels-last maps with torchvision."""
    return Figure(value=_roi_error(context, half=False, channels_last=True), most=1e-5)


def values_f16(context: Context) -> Figure:
    """Compares RoIAlign on half-precision maps with torchvision."""
    return Figure(value=_roi_error(context, half=True, channels_last=False), most=HALF_ERROR)


def values_f16_channels_last(context: Context) -> Figure:
    """Compares RoIAlign on half-precision channels-last maps with torchvision."""
    return Figure(value=_roi_error(context, half=True, channels_last=True), most=HALF_ERROR)


def nms_keeps(context: Context) -> Figure:
    """Counts the rows of NMS whose keep set differs from torchvision's, ties included."""
    need_kernels(context)
    import torch
    import torchvision

    from comask.models.nms import sorted_nms

    generator = torch.Generator().manual_seed(0)
    rows, count = 200, 300
    corner = torch.rand(rows, count, 2, generator=generator) * 100
    side = torch.rand(rows, count, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + side), dim=2)
    boxes[::2] = boxes[::2].round()  # equal overlaps
    groups = torch.randint(0, 4, (rows, count), generator=generator, dtype=torch.int32)
    keep = sorted_nms(boxes.to(context.device), groups.to(context.device), 0.5).cpu()
    rank = torch.arange(count, 0, -1, dtype=torch.float32)
    wrong = 0
    for row in range(rows):
        kept = torchvision.ops.batched_nms(boxes[row], rank, groups[row].long(), 0.5)
        expected = torch.zeros(count, dtype=torch.bool)
        expected[kept] = True
        wrong += int(not torch.equal(expected, keep[row]))
    return Figure(value=float(wrong), unit=f"of {rows} rows", most=0)


def speed(context: Context) -> Figure:
    """Compares the time of our RoIAlign and torchvision's pooling of the same half-precision pyramid."""
    ours, theirs, note = _times(context)
    return Figure(value=theirs / ours, unit="times as fast", least=3.0, note=note)


def bandwidth(context: Context) -> Figure:
    """Measures the bytes per second of RoIAlign's inputs and outputs relative to a plain copy."""
    context.need_gpu()
    need_kernels(context)
    import torch

    from comask.models.roi_align import pyramid_roi_align

    maps, rois = noise_pyramid(context, half=True, channels_last=True)
    pooled = pyramid_roi_align(maps, rois, 7, sampling_ratio=2, canonical_size=CANONICAL)
    time = seconds(
        lambda: pyramid_roi_align(maps, rois, 7, sampling_ratio=2, canonical_size=CANONICAL),
        context.sizes.repeats, context.device, cold=True,
    )  # fmt: skip
    moved = 2 * pooled.numel() + 2 * context.sizes.channels * _pixels_read(maps, rois)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source), context.sizes.repeats, "cuda", cold=True)
    copy = 2 * 2**30 / copied
    note = f"{moved / time / 1e12:.2f} of a copy's {copy / 1e12:.2f} TB/s"
    return Figure(value=moved / time / copy, unit="of a copy", least=0.6, note=note)


def nms_speed(context: Context) -> Figure:
    """Compares the time of NMS on five rows of 1000 boxes with torchvision's NMS row by row."""
    need_kernels(context)
    import torch
    import torchvision

    from comask.models.nms import sorted_nms

    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(5, 1000, 2, generator=generator) * 800
    boxes = torch.cat((corner, corner + torch.rand(5, 1000, 2, generator=generator) * 200), dim=2)
    boxes = boxes.to(context.device)
    groups = torch.zeros(5, 1000, dtype=torch.int32, device=context.device)
    rank = torch.arange(1000, 0, -1, dtype=torch.float32, device=context.device)
    repeats = context.sizes.repeats
    ours = seconds(lambda: sorted_nms(boxes, groups, 0.7), repeats, context.device)
    theirs = seconds(
        lambda: [torchvision.ops.nms(row, rank, 0.7) for row in boxes], repeats, context.device
    )
    note = f"{1e6 * ours:.0f} us against {1e6 * theirs:.0f} us"
    least = 1.0 if context.device == "cuda" else None
    return Figure(value=theirs / ours, unit="times as fast", least=least, note=note)


def need_kernels(context: Context) -> None:
    """Makes sure that our kernels are used; otherwise torchvision would be compared with itself.

    Raises:
        UnavailableError: if no compiler is available.
        KernelError: if a kernel fails to compile or load.
    """
    import torch

    from comask.kernels.launch import NMS, ROI_ALIGN
    from comask.kernels.run import available

    device = torch.device(context.device, 0) if context.device == "cuda" else torch.device("cpu")
    if not all(available(source, device) for source in (ROI_ALIGN, NMS)):
        raise UnavailableError(
            "there is no compiler for the kernels; comask doctor says which one is needed"
        )


def noise_pyramid(
    context: Context, *, half: bool, channels_last: bool
) -> tuple[list[Tensor], Tensor]:
    """Returns a pyramid of noise and RoIs from 8 pixels to the canvas size, spread over all levels."""
    import torch

    sizes, generator = context.sizes, torch.Generator().manual_seed(2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [
        torch.randn(1, sizes.channels, sizes.height // s, sizes.width // s, generator=generator)
        .to(context.device, torch.float16 if half else torch.float32)
        .contiguous(memory_format=layout)
        for s in STRIDES
    ]
    count = sizes.proposals
    side = 8 * torch.exp(torch.rand(count, 2, generator=generator) * math.log(sizes.height / 8))
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([sizes.width, sizes.height])
    rois = torch.cat((centre - side / 2, centre + side / 2), dim=1)[None]
    return maps, rois.to(context.device)


def _torchvision_pool(maps: list[Tensor], rois: Tensor, size: int) -> Tensor:
    """Pools with torchvision's operator level by level, as its `MultiScaleRoIAlign` does."""
    import torch
    import torchvision

    from comask.models.roi_align import roi_levels

    levels = roi_levels(rois[0], CANONICAL)
    pooled = maps[0].new_empty((rois.shape[1], maps[0].shape[1], size, size))
    for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        chosen = torch.where(levels == level)[0]
        boxes = [rois[0, chosen].to(features.dtype)]
        pooled[chosen] = torchvision.ops.roi_align(
            features, boxes, size, 1 / stride, 2, aligned=True
        )
    return pooled


def _roi_error(context: Context, *, half: bool, channels_last: bool) -> float:
    need_kernels(context)
    from comask.models.roi_align import pyramid_roi_align

    maps, rois = noise_pyramid(context, half=half, channels_last=channels_last)
    worst = 0.0
    for size in (7, 14):
        ours = pyramid_roi_align(maps, rois, size, sampling_ratio=2, canonical_size=CANONICAL)
        # in f32 throughout, because half-precision boxes would be wrong by half a pixel
        expected = _torchvision_pool([m.float().contiguous() for m in maps], rois, size)
        worst = max(worst, float((ours.float() - expected).abs().max()))
    return worst


def _times(context: Context) -> tuple[float, float, str]:
    context.need_gpu()
    need_kernels(context)
    from comask.models.roi_align import pyramid_roi_align

    repeats = context.sizes.repeats
    planes, rois = noise_pyramid(context, half=True, channels_last=False)
    last, _ = noise_pyramid(context, half=True, channels_last=True)
    theirs = seconds(lambda: _torchvision_pool(planes, rois, 7), repeats, context.device)
    times = {
        name: seconds(
            lambda maps=maps: pyramid_roi_align(  # type: ignore[misc]
                maps, rois, 7, sampling_ratio=2, canonical_size=CANONICAL
            ),
            repeats,
            context.device,
        )
        for name, maps in (("planes", planes), ("channels last", last))
    }
    best = min(times, key=lambda name: times[name])
    parts = ", ".join(f"{name} {1e6 * time:.0f} us" for name, time in times.items())
    return times[best], theirs, f"{parts}, torchvision {1e6 * theirs:.0f} us"


def _pixels_read(maps: list[Tensor], rois: Tensor) -> int:
    """Counts the map pixels under the RoIs once each, since no kernel must read one twice from memory."""
    import torch

    from comask.models.roi_align import roi_levels

    levels, pixels = roi_levels(rois[0], CANONICAL), 0
    for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        height, width = features.shape[2:]
        touched = torch.zeros(height, width, dtype=torch.bool)
        for x1, y1, x2, y2 in (rois[0, levels == level] / stride).tolist():
            rows = slice(max(0, math.floor(y1)), max(0, min(height, math.ceil(y2) + 1)))
            touched[rows, max(0, math.floor(x1)) : max(0, min(width, math.ceil(x2) + 1))] = True
        pixels += int(touched.sum())
    return pixels


CHECKS = {
    "RoIAlign equals torchvision, f32": values_f32,
    "RoIAlign equals torchvision, f32 channels last": values_f32_channels_last,
    "RoIAlign equals torchvision, f16": values_f16,
    "RoIAlign equals torchvision, f16 channels last": values_f16_channels_last,
    "NMS keeps what torchvision keeps": nms_keeps,
    "RoIAlign's speed against torchvision's": speed,
    "RoIAlign's bandwidth": bandwidth,
    "NMS's speed against torchvision's": nms_speed,
    **pixels.CHECKS,
}
