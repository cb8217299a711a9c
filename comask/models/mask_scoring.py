"""Estimates how good a predicted mask is, as Mask Scoring R-CNN does (Huang et al., CVPR 2019).

A class score says what an object is, and nothing of its mask. Multiplied by an estimate of the mask's IoU
with the object, it also ranks masks. That paper's branch has layers of its own on 14×14 features of the
RoI. This one continues from the head's 7×7 features, for a tenth of the work.

Legend: R RoIs, C channels of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from comask.config import ModelConfig
from comask.models.box_refinement import CELLS, MASK_SIZE
from comask.models.precision import FloatTensors, with_norm

STEP = MASK_SIZE // CELLS  # pixels of a mask along a cell's side


class MaskScorer(FloatTensors):
    """Two convolutions over features and mask, their mean over the RoI, and one output.

    Args:
        config: the network's settings.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, layers = config.head_channels, []
        for before in (channels + STEP**2, channels):
            conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += with_norm(conv, config.norm_groups)
        self.convs = nn.Sequential(*layers)
        self.iou = nn.Linear(channels, 1)
        nn.init.normal_(self.iou.weight, std=0.01)
        nn.init.zeros_(self.iou.bias)

    def forward(self, features: Tensor, mask_logits: Tensor) -> Tensor:
        """Estimates the logit of each mask's IoU with its object.

        Args:
            features: [R, C, 7, 7], the head's.
            mask_logits: [R, 28, 28], the masks of the RoIs' own classes.

        Returns:
            [R] f32; the IoU is of the whole object, also of its part outside the RoI.
        """
        masks = torch.sigmoid(mask_logits)
        cells = masks.reshape(-1, CELLS, STEP, CELLS, STEP).permute(0, 2, 4, 1, 3)
        cells = cells.reshape(-1, STEP**2, CELLS, CELLS)  # a cell's pixels as channels
        dtype = self.iou.weight.dtype
        hidden = self.convs(torch.cat((features.to(dtype), cells.to(dtype)), dim=1))
        logits: Tensor = self.iou(hidden.float().mean(dim=(2, 3)).to(dtype)).float()
        return logits[:, 0]
