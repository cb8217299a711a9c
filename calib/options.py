"""What a user says about int8. Imports nothing heavy, so that the command line may show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal["error", "entropy", "percentile", "minmax"]
METHODS: tuple[Method, ...] = get_args(Method)  # the first is the default


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How int8 graphs are made.

    Attributes:
        calib_data: folder or data set of the images that tell activations' ranges, or `shapes`; None
            is good only where no graphs are made.
        calib_images: number of them.
        calib_method: from histograms to ranges, see `Calibration.ranges`.
        calib_seed: of the choice of images.
        val_images: number of images at most that AP is measured on.
        ap_budget: AP points that boxes or masks may lose to PyTorch in fp32.
    """

    calib_data: str | None = None
    calib_images: int = 64
    calib_method: Method = METHODS[0]
    calib_seed: int = 0
    val_images: int = 500
    ap_budget: float = 0.3
