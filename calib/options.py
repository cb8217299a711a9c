"""The options of int8. This module imports nothing heavy, so that `--help` can show their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal["error", "entropy", "percentile", "minmax"]
METHODS: tuple[Method, ...] = get_args(Method)  # the first is the default


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """The options of `comask quantize`.

    Attributes:
        calib_data: the folder or data set of images that activations are measured on, or `shapes`.
        calib_limit: the number of calibration images.
        calib_method: the method that turns histograms into ranges, see `Calibration.ranges`.
        calib_seed: the seed by which calibration images are chosen.
        limit: the largest number of images that AP is measured on.
        max_loss: the AP points that boxes or masks may lose to PyTorch in fp32.
        skip_cpu: whether int8 is not timed on this processor, and may be slower than other precisions.
    """

    calib_data: str
    calib_limit: int = 64
    calib_method: Method = METHODS[0]
    calib_seed: int = 0
    limit: int = 500
    max_loss: float = 0.3
    skip_cpu: bool = False
