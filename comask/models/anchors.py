"""RPN anchors: three boxes at every place of every level, agreeing with torchvision's."""

from __future__ import annotations

import torch
from torch import Tensor


def base_anchors(size: float, ratios: tuple[float, ...]) -> Tensor:
    """[A, 4] boxes of area size² around the origin, one a height:width ratio, rounded to pixels."""
    ratio = torch.tensor(ratios)
    h = size * torch.sqrt(ratio)
    w = size / torch.sqrt(ratio)
    return (torch.stack((-w, -h, w, h), dim=1) / 2).round()


def level_anchors(base: Tensor, height: int, width: int, stride: int) -> Tensor:
    """All anchors of one level.

    Args:
        base: [A, 4] boxes around the origin.
        height, width: of the level; a place (i, j) is centred on pixel (j, i) × stride.
        stride: 4…64, exact whatever the image's size.

    Returns:
        [height·width·A, 4] in row, column, anchor order.
    """
    x = torch.arange(width, device=base.device, dtype=base.dtype) * stride
    y = torch.arange(height, device=base.device, dtype=base.dtype) * stride
    grid_y = y[:, None].expand(height, width)
    grid_x = x[None, :].expand(height, width)
    shifts = torch.stack((grid_x, grid_y, grid_x, grid_y), dim=-1)  # [height, width, 4]
    return (shifts[:, :, None] + base).reshape(-1, 4)
