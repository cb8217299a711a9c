"""Defines `PyramidRoiAlign`, a custom op of the exported graphs: RoIAlign from the level that fits a RoI.

The kernel is `comask/kernels/pyramid_roi_align.cu`; `comask.export.functions` defines the same op as an
ONNX function.

Legend: B batch, N RoIs per image, R all RoIs, C channels, S output size.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor

from comask.kernels.launch import LEVEL_STRIDES, ROI_ALIGN, roi_align_launch
from comask.kernels.run import available, on_tensors

STRIDES = tuple(LEVEL_STRIDES.values())  # P2..P5
CANONICAL_LEVEL = 4
# A RoI leaves level k for k + 1 when its side reaches canonical_size × 2^(k + 1 - 4 - 1e-6).
LEVEL_FACTORS = tuple(2.0 ** (k - CANONICAL_LEVEL - 1e-6) for k in (3, 4, 5))

DENSE_AREA = 64 * 64  # largest map, in feature pixels, for which `dense_roi_align` is faster


def roi_levels(rois: Tensor, canonical_size: float) -> Tensor:
    """Returns the index (0 = P2 … 3 = P5) of each RoI's level.

    The level is k = floor(4 + log2(√(wh) / 224) + 1e-6), clamped to 2..5 (FPN, equation 1). It is
    computed by three comparisons, which round alike in every backend, unlike a logarithm. A RoI without
    area takes P2.

    Args:
        rois: [..., 4] f32 `xyxy` in pixels.
        canonical_size: the side in pixels of a RoI that is pooled from P4; 224 in the paper's FPN.

    Returns:
        [...] i64.
    """
    width, height = (rois[..., 2:] - rois[..., :2]).clamp(min=0).unbind(-1)
    side = torch.sqrt(width * height)
    bounds = torch.tensor(LEVEL_FACTORS, device=rois.device, dtype=rois.dtype) * canonical_size
    return (side[..., None] >= bounds).sum(-1)


def pyramid_roi_align(
    pyramid: list[Tensor],
    rois: Tensor,
    output_size: int,
    *,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """Pools each RoI from one level of the pyramid (half-pixel aligned, averaged samples).

    Args:
        pyramid: P2..P5, each [B, C, H/stride, W/stride]; further levels are ignored.
        rois: [B, N, 4] f32 `xyxy` in pixels of the resized image.
        output_size: S, the number of bins per side.
        sampling_ratio: samples per bin and axis.
        canonical_size: as for `roi_levels`.

    Returns:
        [B·N, C, S, S].
    """
    maps = pyramid[: len(STRIDES)]
    batch, count = rois.shape[:2]
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "comask::PyramidRoiAlign",
            (*maps, rois),
            attrs={
                "output_size": output_size,
                "sampling_ratio": sampling_ratio,
                "canonical_size": canonical_size,
                "canonical_level": CANONICAL_LEVEL,
                "strides": list(STRIDES),
                "aligned": 1,
                "plugin_namespace": "comask",
                "plugin_version": "1",
            },
            dtype=maps[0].dtype,
            shape=(batch * count, maps[0].shape[1], output_size, output_size),
            version=1,
        )
    pooled: Tensor = _pyramid_roi_align(
        *maps, rois.reshape(-1, 4), count, output_size, sampling_ratio, canonical_size
    )
    return pooled


def pool_rows(
    pyramid: list[Tensor],
    rows: Tensor,
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """Pools RoIs as `pyramid_roi_align` does; each RoI states the index of its image.

    Args:
        pyramid: P2..P5; further levels are ignored.
        rows: [R, 5] f32, image index and `xyxy` in pixels.
        output_size: S, the number of bins per side.
        sampling_ratio: samples per bin and axis.
        canonical_size: as for `roi_levels`.

    Returns:
        [R, C, S, S].
    """
    maps = pyramid[: len(STRIDES)]
    if rows.device.type == "cpu" and any(features.requires_grad for features in maps):
        return _pool_by_level(maps, rows, output_size, sampling_ratio, canonical_size)
    pooled: Tensor = _pyramid_roi_align(*maps, rows, 0, output_size, sampling_ratio, canonical_size)
    return pooled


@torch.library.custom_op("comask::pyramid_roi_align", mutates_args=())
def _pyramid_roi_align(
    p2: Tensor,
    p3: Tensor,
    p4: Tensor,
    p5: Tensor,
    rois: Tensor,
    rois_per_image: int,
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """Runs the kernel on tensors, or torchvision's operators where the kernel cannot be compiled.

    Args:
        p2, p3, p4, p5: [B, C, H, W] of any layout; types other than f32 and f16 are converted to f32.
        rois: [R, 4], or [R, 5] if `rois_per_image` is 0.
        rois_per_image: as for `roi_align_launch`.
        output_size: S, the number of bins per side.
        sampling_ratio: samples per bin and axis.
        canonical_size: as for `roi_levels`.

    Returns:
        [R, C, S, S] in the type and layout of the maps.

    Raises:
        ValueError: when the maps differ in type, or the tensors are on different devices.
    """
    maps, layout, dtype = [p2, p3, p4, p5], _layout([p2, p3, p4, p5]), p2.dtype
    kinds = {(features.dtype, features.device) for features in maps}
    if len(kinds) > 1 or rois.device != p2.device:
        types = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (*maps, rois))
        raise ValueError(
            f"pyramid_roi_align got p2..p5 and rois of {types}; the maps must be of one type, and all "
            "on one device"
        )
    has_kernel = available(ROI_ALIGN, p2.device)
    if dtype not in (torch.float32, torch.float16) or not has_kernel:
        maps = [features.float() for features in maps]
    if not has_kernel:
        rows = _rows(rois, rois_per_image)
        pooled = _pool_by_level(maps, rows, output_size, sampling_ratio, canonical_size)
        return pooled.to(dtype).contiguous(memory_format=layout)
    maps = [features.contiguous(memory_format=layout) for features in maps]
    kernel = roi_align_launch(
        [features.shape for features in maps], len(rois), rois_per_image, output_size,
        sampling_ratio, canonical_size,
        half=maps[0].dtype == torch.float16, channels_last=layout == torch.channels_last,
    )  # fmt: skip
    shape = (len(rois), p2.shape[1], output_size, output_size)
    pooled = torch.empty(shape, dtype=maps[0].dtype, device=p2.device, memory_format=layout)
    on_tensors(kernel, [*maps, rois.float().contiguous()], pooled)
    return pooled.to(dtype)


@_pyramid_roi_align.register_fake
def _fake(*inputs: Any) -> Tensor:
    p2, p3, p4, p5, rois, _, output_size, *_ = inputs
    shape = (rois.shape[0], p2.shape[1], output_size, output_size)
    layout = _layout([p2, p3, p4, p5])
    return torch.empty(shape, dtype=p2.dtype, device=p2.device, memory_format=layout)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *maps, rois, ctx.rois_per_image, _, ctx.sampling_ratio, ctx.canonical_size = inputs
    ctx.save_for_backward(rois)
    ctx.shapes, ctx.dtype = [features.shape for features in maps], output.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Computes the gradients of the maps with torchvision's operator, level by level, in f32."""
    rows = _rows(ctx.saved_tensors[0], ctx.rois_per_image)
    levels = roi_levels(rows[:, 1:], ctx.canonical_size)
    size = grad.shape[2]
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for level, (shape, stride) in enumerate(zip(ctx.shapes, STRIDES, strict=True)):
        if ctx.needs_input_grad[level]:
            chosen = torch.where(levels == level)[0]
            grads[level] = torch.ops.torchvision._roi_align_backward(
                grad[chosen].float().contiguous(), rows[chosen], 1 / stride, size, size, *shape,
                ctx.sampling_ratio, True,
            ).to(ctx.dtype)  # fmt: skip
    return tuple(grads)


_pyramid_roi_align.register_autograd(_backward, setup_context=_save)


def _layout(maps: list[Tensor]) -> torch.memory_format:
    """Returns the layout that all maps have, so that none is copied; else the contiguous one."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if all(features.is_contiguous(memory_format=layout) for features in maps):
            return layout
    return torch.contiguous_format


def _rows(rois: Tensor, rois_per_image: int) -> Tensor:
    """Returns [R, 5] f32, image index and box, for the [R, 4] or [R, 5] of `_pyramid_roi_align`."""
    if rois_per_image == 0:
        return rois.float()
    image = torch.arange(len(rois), device=rois.device) // rois_per_image
    return torch.cat((image[:, None].float(), rois.float()), dim=1)


def _pool_by_level(
    maps: list[Tensor], rows: Tensor, output_size: int, sampling_ratio: int, canonical_size: float
) -> Tensor:
    """Pools as `pool_rows` does, on each level by the operator that is fastest for its size."""
    levels = roi_levels(rows[:, 1:], canonical_size)
    pooled = maps[0].new_zeros((len(rows), maps[0].shape[1], output_size, output_size))
    for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        chosen = torch.where(levels == level)[0]
        if len(chosen) == 0:
            continue
        small = features.shape[2] * features.shape[3] <= DENSE_AREA
        trains_on_cpu = features.requires_grad and features.device.type == "cpu"
        if small and trains_on_cpu:
            part = dense_roi_align(features, rows[chosen], output_size, 1 / stride, sampling_ratio)
        else:
            part = torchvision.ops.roi_align(
                features, rows[chosen], output_size, 1 / stride, sampling_ratio, aligned=True
            )
        pooled[chosen] = part.to(pooled.dtype)  # autocast may give dense_roi_align another type
    return pooled


def dense_roi_align(
    features: Tensor, rows: Tensor, output_size: int, scale: float, sampling_ratio: int
) -> Tensor:
    """Computes RoIAlign as two matrix products, since bilinear sampling is separable.

    It serves training on a CPU with small maps, where torchvision's backward pass scatters with a single
    thread (`benchmarks/roi_align.py` compares the two).

    Args:
        features: [B, C, H, W].
        rows: [R, 5] f32, image index and `xyxy` in pixels.
        output_size: S, the number of bins per side.
        scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis.

    Returns:
        [R, C, S, S].
    """
    channels, height, width = features.shape[1:]
    x1, y1, x2, y2 = (rows[:, 1:] * scale - 0.5).unbind(1)
    along_y = _sampling_matrix(y1, y2, output_size, sampling_ratio, height)
    along_x = _sampling_matrix(x1, x2, output_size, sampling_ratio, width)
    places = [torch.where(rows[:, 0] == image)[0] for image in range(len(features))]
    parts = []
    for plane, place in zip(features, places, strict=True):
        columns = plane.permute(1, 0, 2).reshape(height, channels * width)
        part = along_y[place].flatten(0, 1) @ columns
        part = part.view(len(place), output_size * channels, width) @ along_x[place].transpose(1, 2)
        parts.append(part.view(len(place), output_size, channels, output_size).transpose(1, 2))
    return torch.cat(parts)[torch.cat(places).argsort()]


def _sampling_matrix(
    start: Tensor, end: Tensor, output_size: int, sampling_ratio: int, length: int
) -> Tensor:
    """Returns [R, S, length], the weight of each feature pixel in each bin from `start` to `end`, [R]."""
    samples = output_size * sampling_ratio
    share = (torch.arange(samples, device=start.device) + 0.5) / samples
    position = start[:, None] + (end - start)[:, None] * share
    inside = (position >= -1) & (position <= length)  # samples farther outside count as zero
    pixel = torch.arange(length, device=start.device)
    distance = (position.clamp(0, length - 1)[..., None] - pixel).abs()
    weights = (1 - distance).clamp(min=0) * inside[..., None]
    means: Tensor = weights.unflatten(1, (output_size, sampling_ratio)).mean(2)
    return means
