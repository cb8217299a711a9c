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
    indexed = torch.cat((image[:, None], rois.reshape(-1, 4)), dim=1)
    levels = roi_levels(rois, canonical_size).reshape(-1)
    size = (output_size, output_size)
    pooled = maps[0].new_zeros((batch * count, maps[0].shape[1], *size))
    for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        chosen = torch.where(levels == level)[0]
        if len(chosen):
            pooled[chosen] = torchvision.ops.roi_align(
                features, indexed[chosen], size, 1 / stride, sampling_ratio, aligned=True
            )
    return pooled
