"""What stays f32 in a network that `half()` has converted to f16.

f16 has 11 significant bits and ends at 65504: enough for weights and activations, not for pixels, for
fractions of a large RoI, or for sums over a map.
"""

from __future__ import annotations

from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn


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
