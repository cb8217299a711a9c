"""Keeps parts of a network in f32 when `half()` converts it to f16.

f16 has 11 significant bits and a maximum of 65504. That is enough for weights and activations, but not
for pixel coordinates, fractions of a large RoI, or sums over a map.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Paths in `CoMask` of the modules whose outputs (logits, deltas, offsets) are read in f32.
FLOAT_OUTPUTS = ("rpn", "classifier", "head", "fine_head", "mask_scorer")


class FloatTensors(nn.Module):
    """A module whose own parameters and buffers stay f32 when `half()` converts its layers."""

    def half(self) -> Self:
        """Converts the child layers to f16, but not the module's own parameters and buffers."""
        for layer in self.children():
            layer.half()
        return self


class GroupNorm(nn.GroupNorm):
    """GroupNorm with statistics in f32, since a sum of squares over a large map exceeds f16."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [B, C, …]; the result has the type of the weights."""
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.group_norm(x.float(), self.num_groups, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, h, w], with statistics in f32."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [B, C, h, w]; the result has the type of the weights."""
        weight, bias = self.weight.float(), self.bias.float()
        last = x.float().permute(0, 2, 3, 1)
        normed = F.layer_norm(last, self.normalized_shape, weight, bias, self.eps)
        return normed.permute(0, 3, 1, 2).to(self.weight.dtype)


def with_norm(conv: nn.Conv2d | nn.ConvTranspose2d, norm_groups: int) -> list[nn.Module]:
    """Returns a convolution, its GroupNorm and a ReLU."""
    return [conv, GroupNorm(norm_groups, conv.out_channels), nn.ReLU(inplace=True)]


def half_around(model: nn.Module, islands: Collection[str]) -> None:
    """Converts a network to f16 in place, except for its float islands, whose layers compute in f32.

    Inputs of an island are cast to f32, its outputs to f16. Hooks do that, since a wrapper would rename
    the weights, whose names pair graphs of two precisions.

    Args:
        model: a network in f32.
        islands: paths of modules, such as `backbone.layer3.2`; no island may contain another.
    """
    kept = {path: deepcopy(model.get_submodule(path)) for path in islands}
    model.half()
    for path, module in kept.items():
        module.register_forward_pre_hook(lambda _, args: _cast(args, torch.float32))
        if path not in FLOAT_OUTPUTS:
            module.register_forward_hook(lambda _, __, output: _cast(output, torch.float16))
        model.set_submodule(path, module)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Casts a tensor of numbers, or those of nested lists and tuples; indices stay as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(_cast(part, dtype) for part in value)
