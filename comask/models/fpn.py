"""Feature pyramid network (Lin et al., CVPR 2017); the paper's Fig. 1 builds on it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """P2..P5 from C2..C5, `channels` wide.

    Args:
        in_channels: of C2..C5.
        channels: of every level.
        smooth: end with a 3×3 convolution a level; without it another module does its work.
    """

    def __init__(self, in_channels: tuple[int, ...], channels: int, *, smooth: bool = True) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) if smooth else nn.Identity()
            for _ in in_channels
        )
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """C2..C5, finest first → P2..P5, each [B, channels, H/2^i, W/2^i]."""
        merged = [conv(c) for conv, c in zip(self.lateral, features, strict=True)]
        for i in range(len(merged) - 2, -1, -1):
            coarse = F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
            merged[i] = merged[i] + coarse
        return [conv(m) for conv, m in zip(self.output, merged, strict=True)]


def coarsest(p5: Tensor) -> Tensor:
    """P6: P5 at every second pixel, as in detectron2; only the RPN reads it."""
    return F.max_pool2d(p5, kernel_size=1, stride=2)
