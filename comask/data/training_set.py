"""What the training loop iterates over: resized, flipped, padded batches of images of like shape.

Everything random is a function of (seed, epoch, image), never of the worker or the order in which
images are loaded, so a resumed run sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from comask.config import PreprocessConfig
from comask.data.source import Id, InstanceSource
from comask.data.target import Crop, MaskCrops, Target
from comask.errors import ImageError, one_line
from comask.preprocess import prepare
from comask.segmentation import read_segmentation

Key = tuple[int, int]  # (epoch, index into the source)
Item = tuple[Tensor, tuple[int, int], Target, Id]  # canvas, size on it, target, image id
_reported: set[str] = set()  # this process's messages about images, which name their files


class TrainingSet(Dataset[Item]):
    """Images and targets of a source, ready for the network but for batching.

    Args:
        source: where they come from.
        indices: the images of `source` to use.
        preprocess: resize and padding.
        flip_probability: of a horizontal flip.
        seed: of the flips.
    """

    def __init__(
        self,
        source: InstanceSource,
        indices: list[int],
        preprocess: PreprocessConfig,
        *,
        flip_probability: float,
        seed: int,
    ) -> None:
        self.source = source
        self.indices = indices
        self._preprocess = preprocess
        self._flip_probability = flip_probability
        self._seed = seed
        self._label_of = {c.id: label for label, c in enumerate(source.categories)}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Item:
        """Canvas u8 [H, W, 3], size (h, w) on it, target and image id; `key` is (epoch, index).

        An image that cannot be decoded is reported once a process, and the set's next one that can
        be takes its place.

        Raises:
            ImageError: when no image can be decoded.
        """
        epoch, index = key
        index, pixels = self._next_decodable(index)
        info = self.source.info(index)
        boxes, crowds, labels, crops = [], [], [], list[Crop]()
        for annotation in self.source.annotations(index):
            x, y, w, h = annotation["bbox"]
            if annotation.get("iscrowd"):
                crowds.append([x, y, x + w, y + h])
                continue
            if w <= 0 or h <= 0:  # in a source that nobody checked
                continue
            boxes.append([x, y, x + w, y + h])
            labels.append(self._label_of[annotation["category_id"]])
            mask = read_segmentation(annotation["segmentation"], info.height, info.width)
            crops.append(mask.crop())
        box, crowd = (np.array(b, dtype=np.float32).reshape(-1, 4) for b in (boxes, crowds))
        rng = np.random.default_rng([self._seed, epoch, index])
        if rng.random() < self._flip_probability:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            for corners in (box, crowd):
                corners[:, [0, 2]] = info.width - corners[:, [2, 0]]
            crops = [
                (info.width - x - crop.shape[1], y, np.ascontiguousarray(crop[:, ::-1]))
                for x, y, crop in crops
            ]
        prepared = prepare(pixels, self._preprocess)
        scale_y, scale_x = prepared.scale
        scale = torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float32)
        target = Target(
            boxes=torch.from_numpy(box) * scale,
            crowds=torch.from_numpy(crowd) * scale,
            labels=torch.tensor(labels, dtype=torch.int64),
            masks=MaskCrops.of(crops, (info.height, info.width)),
            mask_scale=1 / scale,
            seed=int(rng.integers(2**62)),
        )
        return torch.from_numpy(prepared.canvas), prepared.size, target, info.id

    def _next_decodable(self, index: int) -> tuple[int, NDArray[np.uint8]]:
        """The image at `index`, or the next in `indices`, wrapping round; and which it is."""
        errors: list[ImageError] = []
        while True:
            try:
                pixels = self.source.image(index)
                break
            except ImageError as error:
                errors.append(error)
            if len(errors) == len(self.indices):
                raise errors[0]
            index = self.indices[(self.indices.index(index) + 1) % len(self.indices)]
        for message in map(one_line, errors):
            if message not in _reported:
                _reported.add(message)
                print(f"warning: {message}; trained without it", file=sys.stderr, flush=True)
        return index, pixels
