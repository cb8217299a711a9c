"""The network's neck, the MFPN: a feature pyramid with multi-scale modules (section 3.1, Figs. 1 and 2).

The feature pyramid is that of Lin et al., CVPR 2017.

Legend: B batch, C channels, H and W the height and width of one pyramid level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comask.config import ModelConfig
from comask.models.precision import GroupNorm, with_norm


class FPN(nn.Module):
    """The feature pyramid network, which computes P2..P5 from C2..C5.

    Args:
        in_channels: the channels of C2..C5.
        channels: the channels of every level of the pyramid.
        smooth: whether a 3×3 convolution ends each level; if not, another module replaces it.
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
        """Maps C2..C5, finest first, to P2..P5, each [B, channels, H/2^i, W/2^i]."""
        merged = [conv(c) for conv, c in zip(self.lateral, features, strict=True)]
        for i in range(len(merged) - 2, -1, -1):
            coarse = F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
            merged[i] = merged[i] + coarse
        return [conv(m) for conv, m in zip(self.output, merged, strict=True)]


def coarsest(p5: Tensor) -> Tensor:
    """Returns P6: every second pixel of P5, as in detectron2; only the RPN reads it."""
    return F.max_pool2d(p5, kernel_size=1, stride=2)


def downsample(channels: int, norm_groups: int) -> nn.Sequential:
    """Returns C₂ of equation 1: a 3×3 convolution of stride 2; GN and ReLU keep chains nonlinear."""
    conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(*with_norm(conv, norm_groups))


class ChannelAttention(nn.Module):
    """Channel attention: squeeze, two fully connected layers, sigmoid, rescale (equations 4 to 6)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction, bias=False)
        self.excite = nn.Linear(channels // reduction, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scales each channel of [B, C, H, W] by a weight in 0..1."""
        # equation 4: V₁ = gp(F_f), in f32 since a sum over P2's pixels exceeds f16
        pooled = x.mean(dim=(2, 3), dtype=torch.float32).to(self.squeeze.weight.dtype)
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))  # equation 5: V₂
        return x * weights[:, :, None, None]  # equation 6: F̂_f = F_f × EX(V₂; F_f)


class MSFEM(nn.Module):
    """The multi-scale module of one level: branches at falling resolution, fused, attended, smoothed.

    Branch i sees the input after i convolutions of stride 2. The mode `independent` gives each branch i
    convolutions of its own, `chain` continues from branch i - 1, and `tied` also uses one convolution for
    all branches, as equation 1 is written. With `residual_attention`, the module ends with
    ReLU(x + GN(conv(x))), as in the authors' code, instead of equation 7.

    Args:
        config: the network's settings.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, branches = config.channels, config.msfem_branches
        self.mode = config.msfem_mode
        depths = {
            "independent": list(range(1, branches)),
            "chain": [1] * (branches - 1),
            "tied": [1] * min(branches - 1, 1),
        }[self.mode]
        self.branches = nn.ModuleList(
            nn.Sequential(*(downsample(channels, config.norm_groups) for _ in range(depth)))
            for depth in depths
        )
        self.num_branches = branches
        self.reduce: nn.Conv2d | nn.ModuleList = nn.Conv2d(channels * branches, channels, 1)
        self.attention = ChannelAttention(channels, config.attention_reduction)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = GroupNorm(config.norm_groups, channels) if config.residual_attention else None
        # The module starts as the identity, so that the layers before and after it, such as an FPN and
        # an RPN with pretrained weights, fit together from the first step. Only F₀ passes, and a dirac
        # kernel of 2 cancels the attention's first weights, σ(0) = ½. A residual module is not the
        # identity, because of its norm and ReLU.
        nn.init.dirac_(self.reduce.weight)
        nn.init.dirac_(self.smooth.weight)
        with torch.no_grad():
            self.smooth.weight.mul_(2.0)
        nn.init.zeros_(self.attention.excite.weight)
        for conv in (self.reduce, self.smooth):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def scales(self, x: Tensor) -> list[Tensor]:
        """Returns F_i = C₂^i(F), with F₀ = F (equation 1), each at its own resolution."""
        scales = [x]
        for i in range(1, self.num_branches):
            if self.mode == "independent":
                scales.append(self.branches[i - 1](x))
            else:
                scales.append(self.branches[0 if self.mode == "tied" else i - 1](scales[-1]))
        return scales

    def fuse(self, x: Tensor) -> Tensor:
        """Returns F_f = Conv(cat(F₀, F₁, F₂, F₃)), the scales resized to F₀'s size (equations 2 and 3).

        A 1×1 convolution of a concatenation is the sum of 1×1 convolutions of its parts. It commutes
        with the resize, since both are linear. Each scale is therefore reduced at its own resolution,
        and the concatenation with its 4·C channels never exists.
        """
        first, *others = self.scales(x)
        fused: Tensor = self._reduced(first, 0)
        for place, scale in enumerate(others, 1):
            reduced = self._reduced(scale, place)
            fused = fused + F.interpolate(
                reduced, size=x.shape[-2:], mode="bilinear", align_corners=True
            )
        return fused

    def _reduced(self, scale: Tensor, place: int) -> Tensor:
        """Applies the part of `reduce` that reads one scale."""
        if isinstance(self.reduce, nn.ModuleList):
            reduced: Tensor = self.reduce[place](scale)
            return reduced
        channels = scale.shape[1]
        weight = self.reduce.weight[:, place * channels : (place + 1) * channels]
        return F.conv2d(scale, weight, None if place else self.reduce.bias)

    def split_reduce(self) -> None:
        """Gives each scale a convolution of its own, in place, so that a graph has a layer for each."""
        assert isinstance(self.reduce, nn.Conv2d)
        whole, parts = self.reduce, nn.ModuleList()
        for place, weight in enumerate(whole.weight.split(whole.out_channels, dim=1)):
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=place == 0)
            conv.weight = nn.Parameter(weight.detach().clone())
            if place == 0:
                conv.bias = whole.bias
            parts.append(conv)
        self.reduce = parts

    def forward(self, x: Tensor) -> Tensor:
        """Maps one FPN level [B, C, H, W] to the same shape."""
        attended = self.attention(self.fuse(x))  # equations 4-6
        out: Tensor = self.smooth(attended)  # equation 7: F_O = C₁(F̂_f)
        return F.relu(attended + self.norm(out)) if self.norm else out


class MFPN(nn.Module):
    """The FPN with one MSFEM after each of its five levels (end of section 3.1).

    The place `after` is the paper's. `replace` puts four modules in the place of the FPN's 3×3
    convolutions and takes P6 from the last of them, as in the authors' code.

    Args:
        in_channels: the channels of C2..C5.
        config: the network's settings.
    """

    def __init__(self, in_channels: tuple[int, ...], config: ModelConfig) -> None:
        super().__init__()
        self.after = config.msfem_place == "after"
        self.fpn = FPN(in_channels, config.channels, smooth=self.after)
        self.modules_per_level = nn.ModuleList(MSFEM(config) for _ in range(5 if self.after else 4))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps C2..C5 to multi-scale P2..P6, each [B, channels, H/2^i, W/2^i]."""
        levels = self.fpn(features)
        if self.after:
            levels.append(coarsest(levels[-1]))
        out = [module(x) for module, x in zip(self.modules_per_level, levels, strict=True)]
        return out if self.after else [*out, coarsest(out[-1])]
