"""The parts of the network as the paper writes them; the network computes the same with less work."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from comask.models.box_refinement import CollaborativeHead
from comask.models.neck import MSFEM


def multi_scale(module: MSFEM, x: Tensor) -> list[Tensor]:
    """Equation 1: F_i = C₂^i(F), with F₀ = F, each resized to the input's size."""
    size = x.shape[-2:]
    first, *others = module.scales(x)
    resized = [
        functional.interpolate(scale, size=size, mode="bilinear", align_corners=True)
        for scale in others
    ]
    return [first, *resized]


def fuse(module: MSFEM, x: Tensor) -> Tensor:
    """Equations 2 and 3: F_f = Conv(cat(F₀, F₁, F₂, F₃))."""
    assert isinstance(module.reduce, nn.Conv2d)
    fused: Tensor = module.reduce(torch.cat(multi_scale(module, x), dim=1))
    return fused


def class_masks(head: CollaborativeHead, pooled: Tensor) -> Tensor:
    """Mask logits of all classes, [R, K + 1, 28, 28]; channel 0 is the background."""
    features, mask = head.upsample(head.refine(pooled)), head.mask
    return functional.conv2d(features, mask.weight, mask.bias, padding=mask.padding)
