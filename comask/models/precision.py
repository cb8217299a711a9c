"""What stays f32 in a network that `half()` has converted to f16.

f16 has 11 significant bits and ends at 65504: enough for weights and activations, not for pixels, for
fractions of a large RoI, or for sums over a map.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Paths in `CoMask` of the modules that end in logits, deltas and offsets, all of which are read in f32.
FLOAT_OUTPUTS = ("rpn", "classifier", "head", "fine_head")


class FloatTensors(nn.Module):
    """A module whose own parameters and buffers stay f32 when `half()` converts its layers."""

    def half(self) -> Self:
        """Converts the layers inside."""
        for layer in self.children():
            layer.half()
        return self


class GroupNorm(nn.GroupNorm):
    """GroupNorm with its statistics in f32: over a large map a sum of squares exceeds f16."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, …] → the same shape, in the dtype of the weights."""
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.group_norm(x.float(), self.num_groups, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


def with_norm(conv: nn.Conv2d | nn.ConvTranspose2d, norm_groups: int) -> list[nn.Module]:
    """A convolution, its GroupNorm and a ReLU."""
    return [conv, GroupNorm(norm_groups, conv.out_channels), nn.ReLU(inplace=True)]


def half_around(model: nn.Module, islands: Collection[str]) -> None:
    """Converts a network to f16 in place, but for its float islands: their layers compute in f32.

    What enters an island is cast to f32, what leaves it to f16. Hooks do that, since a wrapper would
    rename the weights, and graphs of two precisions are paired by those names.

    Args:
        model: f32.
        islands: paths of modules as `backbone.layer3.2`, none inside another.
    """
    kept = {path: deepcopy(model.get_submodule(path)) for path in islands}
    model.half()
    for path, module in kept.items():
        module.register_forward_pre_hook(lambda _, args: _cast(args, torch.float32))
        if path not in FLOAT_OUTPUTS:
            module.register_forward_hook(lambda _, __, output: _cast(output, torch.float16))
        model.set_submodule(path, module)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, or lists and tuples of them, in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return type(value)(_cast(part, dtype) for part in value)
