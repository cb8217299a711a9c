"""`PyramidRoiAlign`, the custom op of the exported graphs: RoIAlign from the level that fits the RoI.

`comask.export.functions` holds the same op as an ONNX function.

Legend: B batch, N RoIs an image, C channels, S output size.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

STRIDES = (4, 8, 16, 32)  # of P2..P5
CANONICAL_LEVEL = 4
DENSE_AREA = 64 * 64  # largest map, in feature pixels, that `dense_roi_align` is for
# A RoI leaves level k for k + 1 when its side reaches canonical_size × 2^(k + 1 - 4 - 1e-6).
LEVEL_FACTORS = tuple(2.0 ** (k - CANONICAL_LEVEL - 1e-6) for k in (3, 4, 5))


def roi_levels(rois: Tensor, canonical_size: float) -> Tensor:
    """The place (0 = P2 … 3 = P5) of each RoI's level.

    k = floor(4 + log2(√(wh) / 224) + 1e-6), clamped to 2..5 (FPN, equation 1), written as three
    comparisons, which round alike in every backend; a logarithm does not. A RoI without an area
    takes P2.

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
        pyramid: P2..P5, each [B, C, H/stride, W/stride]; more levels are ignored.
        rois: [B, N, 4] f32 `xyxy` in pixels of the resized image.
        output_size: S.
        sampling_ratio: samples a bin and axis.
        canonical_size: see `roi_levels`.

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
    image = torch.arange(batch, device=rois.device, dtype=rois.dtype).repeat_interleave(count)
    rows = torch.cat((image[:, None], rois.reshape(-1, 4)), dim=1)
    return pool_rows(maps, rows, output_size, sampling_ratio, canonical_size)


def pool_rows(
    pyramid: list[Tensor],
    rows: Tensor,
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """`pyramid_roi_align` of RoIs that each name their image.

    Args:
        pyramid: P2..P5; more levels are ignored.
        rows: [R, 5] f32, image index and `xyxy` in pixels.
        output_size: S.
        sampling_ratio: samples a bin and axis.
        canonical_size: see `roi_levels`.

    Returns:
        [R, C, S, S].
    """
    levels = roi_levels(rows[:, 1:], canonical_size)
    pooled = pyramid[0].new_zeros((len(rows), pyramid[0].shape[1], output_size, output_size))
    for level, (features, stride) in enumerate(zip(pyramid, STRIDES, strict=False)):
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
        pooled[chosen] = part.to(pooled.dtype)  # autocast gives dense_roi_align's products its own
    return pooled


def dense_roi_align(
    features: Tensor, rows: Tensor, output_size: int, scale: float, sampling_ratio: int
) -> Tensor:
    """RoIAlign as two matrix products: bilinear sampling is separable.

    For training on a CPU with small maps, where torchvision's backward scatters with one thread
    (`benchmarks/roi_align.py` compares them).

    Args:
        features: [B, C, H, W].
        rows: [R, 5] f32, image index and `xyxy` in pixels.
        output_size: S.
        scale: feature pixels a pixel.
        sampling_ratio: samples a bin and axis.

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
    """[R, S, length]: how much each feature pixel adds to each bin between `start` and `end`, [R]."""
    samples = output_size * sampling_ratio
    share = (torch.arange(samples, device=start.device) + 0.5) / samples
    position = start[:, None] + (end - start)[:, None] * share
    inside = (position >= -1) & (position <= length)  # farther out a sample counts as zero
    pixel = torch.arange(length, device=start.device)
    distance = (position.clamp(0, length - 1)[..., None] - pixel).abs()
    weights = (1 - distance).clamp(min=0) * inside[..., None]
    means: Tensor = weights.unflatten(1, (output_size, sampling_ratio)).mean(2)
    return means
