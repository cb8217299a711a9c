"""What the losses of all heads share: the RoIs of an image, their features, sums with counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from comask.models.comask import CoMask
from comask.models.roi_align import pool_rows


class Term(NamedTuple):
    """A loss before normalisation: a sum and how many items it is over, both scalars f32."""

    total: Tensor
    items: Tensor


class Rois(NamedTuple):
    """The RoIs of one image that train the heads.

    Attributes:
        positive: [P, 4].
        objects: [P] i64, the object of each (index into the target).
        negative: [Q, 4].
    """

    positive: Tensor
    objects: Tensor
    negative: Tensor


def pool_by_image(model: CoMask, pyramid: list[Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """RoIs by image, of differing number → features [ΣR, C, size, size] in the same order."""
    rows = torch.cat([F.pad(b, (1, 0), value=image) for image, b in enumerate(boxes)])
    config = model.config
    return pool_rows(pyramid, rows, size, config.roi_sampling_ratio, config.roi_canonical_size)
