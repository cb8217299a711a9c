"""The ground truth of one image, as the losses take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Crop = tuple[int, int, NDArray[np.bool_]]  # x, y of the top left pixel in the image, and [h, w]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskCrops:
    """Bitmaps of G objects, each cut to its own bounds: memory grows with the objects, not the image.

    Attributes:
        pixels: [P] u8, 0 or 1: the rows of all crops, one object after the other.
        places: [G, 4] i64, (x, y, h, w) of each crop in pixels of the image.
        image_size: (h, w) of the image in pixels.
    """

    pixels: Tensor
    places: Tensor
    image_size: tuple[int, int]

    @classmethod
    def of(cls, crops: list[Crop], image_size: tuple[int, int]) -> MaskCrops:
        """Packs crops that lie in one image."""
        places = [(x, y, *crop.shape) for x, y, crop in crops]
        pixels = [np.zeros(0, np.uint8), *(crop.reshape(-1).view(np.uint8) for _, _, crop in crops)]
        return cls(
            pixels=torch.from_numpy(np.concatenate(pixels)),
            places=torch.tensor(places, dtype=torch.int64).reshape(-1, 4),
            image_size=image_size,
        )

    def bitmaps(self) -> Tensor:
        """[G, h, w] u8 of the whole image, which takes memory as objects × image."""
        whole = self.pixels.new_zeros((len(self.places), *self.image_size))
        start = 0
        for bitmap, (x, y, h, w) in zip(whole, self.places.tolist(), strict=True):
            bitmap[y : y + h, x : x + w] = self.pixels[start : start + h * w].reshape(h, w)
            start += h * w
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The ground truth of one image with G objects and C crowd regions.

    Attributes:
        boxes: [G, 4] f32, of the objects.
        crowds: [C, 4] f32; what lies in them is neither learnt nor background.
        labels: [G] i64 from 0.
        masks: G bitmaps in pixels of the *original* image. Their `places` stay on the CPU.
        mask_scale: [4] f32; boxes × mask_scale are in pixels of `masks`.
        seed: of everything random about this image in this step.
    """

    boxes: Tensor
    crowds: Tensor
    labels: Tensor
    masks: MaskCrops
    mask_scale: Tensor
    seed: int = 0

    def to(self, device: torch.device) -> Target:
        """The same on `device`."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Target:
        """The same in pinned memory, from where a GPU fetches it while the CPU goes on."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> Target:
        """The same in memory that another process can map."""
        places = self.masks.places.share_memory_()
        moved = self._moved(lambda tensor: tensor.share_memory_())
        return replace(moved, masks=replace(moved.masks, places=places))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Target:
        return replace(
            self,
            boxes=move(self.boxes),
            crowds=move(self.crowds),
            labels=move(self.labels),
            masks=replace(self.masks, pixels=move(self.masks.pixels)),
            mask_scale=move(self.mask_scale),
        )

    def generator(self) -> torch.Generator:
        """What draws this image's samples: the same whatever batch or process it is in."""
        return torch.Generator(self.boxes.device).manual_seed(self.seed)
