"""The order of a tensor's values in an engine's memory: as its shape says, or channels-last.

The feature maps cross from stage 1 to stage 2 channels-last, as convolutions on tensor cores write them
and as RoIAlign reads them best. Otherwise, both engines would convert each map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.errors import EngineError

LINEAR = "LINEAR"
# TensorRT's names of the formats of [B, C, H, W] that store [B, H, W, C], and the number that C is padded
# to a multiple of
CHANNELS_LAST = {"HWC": 1, "HWC8": 8}


def map_format(precision: str, plugin: str) -> str:
    """Returns the format in which the feature maps cross between the stages.

    Args:
        precision: the precision of the graphs.
        plugin: how RoIAlign runs; without plugins, standard layers read the maps in their own order.
    """
    if plugin == "none":
        return LINEAR
    return "HWC" if precision == "fp32" else "HWC8"  # int8 graphs have maps in fp16, too


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    """A format that comask can read and write.

    Attributes:
        name: TensorRT's name, such as `LINEAR` or `HWC8`.

    Raises:
        EngineError: if comask does not know the format.
    """

    name: str

    def __post_init__(self) -> None:
        """Checks the name."""
        if self.name != LINEAR and self.name not in CHANNELS_LAST:
            raise EngineError(
                f"an engine has a tensor in TensorRT's format {self.name}; comask reads {LINEAR}, "
                f"{', '.join(CHANNELS_LAST)}: build the engines again with comask build --rebuild"
            )

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the values in memory, padding included, for a tensor's shape."""
        if self.name == LINEAR:
            return shape
        batch, channels, height, width = shape
        multiple = CHANNELS_LAST[self.name]
        return batch, height, width, -(-channels // multiple) * multiple

    def count(self, shape: tuple[int, ...]) -> int:
        """Returns the number of values in memory, padding included."""
        return math.prod(self.stored(shape))

    def view(self, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Returns a view in the tensor's own shape of `count(shape)` values of memory."""
        stored = values.reshape(self.stored(shape))
        if self.name == LINEAR:
            return stored
        return np.moveaxis(stored[..., : shape[1]], -1, 1)
