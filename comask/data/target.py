"""The ground truth of one image, as the losses take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The ground truth of one image with G objects; crowd regions are not among them.

    Attributes:
        boxes: [G, 4] f32.
        labels: [G] i64 from 0.
        masks: [G, h, w] u8 bitmaps of the *original* image (0 or 1).
        mask_scale: [4] f32; boxes × mask_scale are in pixels of `masks`.
        seed: of everything random about this image in this step.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    mask_scale: Tensor
    seed: int = 0

    def to(self, device: torch.device) -> Target:
        """The same on `device`."""
        return Target(
            boxes=self.boxes.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            masks=self.masks.to(device, non_blocking=True),
            mask_scale=self.mask_scale.to(device, non_blocking=True),
            seed=self.seed,
        )

    def pin_memory(self) -> Target:
        """The same in pinned memory, from where a GPU fetches it while the CPU goes on."""
        return Target(
            boxes=self.boxes.pin_memory(),
            labels=self.labels.pin_memory(),
            masks=self.masks.pin_memory(),
            mask_scale=self.mask_scale.pin_memory(),
            seed=self.seed,
        )

    def generator(self) -> torch.Generator:
        """What draws this image's samples: the same whatever batch or process it is in."""
        return torch.Generator(self.boxes.device).manual_seed(self.seed)
