"""Prepares images for the training loop: augmented, resized and padded, with their ground truth.

Everything random is a function of (seed, epoch, image). It depends neither on the worker nor on the order
in which images are loaded, so that a resumed run gets the same images as an uninterrupted one.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from comask.config import DataConfig, PreprocessConfig
from comask.data.augment import Crop, Rng, Sample, augment
from comask.data.source import Id, InstanceSource
from comask.errors import ImageError, one_line
from comask.preprocess import prepare
from comask.segmentation import read_segmentation

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskCrops:
    """Bitmaps of G objects, each cut to its bounds, so that memory grows with the objects alone.

    Attributes:
        pixels: [P] u8, 0 or 1, the rows of one object's crop after the other's.
        places: [G, 4] i64, (x, y, h, w) of each crop in pixels of the image.
        image_size: (h, w) of the image in pixels.
    """

    pixels: Tensor
    places: Tensor
    image_size: tuple[int, int]

    @classmethod
    def of(cls, crops: list[Crop], image_size: tuple[int, int]) -> MaskCrops:
        """Packs crops of one image."""
        places = [(x, y, *crop.shape) for x, y, crop in crops]
        pixels = [np.zeros(0, np.uint8), *(crop.reshape(-1).view(np.uint8) for _, _, crop in crops)]
        return cls(
            pixels=torch.from_numpy(np.concatenate(pixels)),
            places=torch.tensor(places, dtype=torch.int64).reshape(-1, 4),
            image_size=image_size,
        )

    def areas(self) -> Tensor:
        """Returns the number of pixels of each object, [G] f32."""
        sizes = self.places[:, 2:].prod(dim=1).to(self.pixels.device)
        owners = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        areas = torch.zeros(len(sizes), device=sizes.device)
        return areas.index_add(0, owners, self.pixels.float())

    def crops(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (x, y, crop [h, w] u8) of each object."""
        start = 0
        for x, y, h, w in self.places.tolist():
            yield x, y, self.pixels[start : start + h * w].reshape(h, w)
            start += h * w

    def bitmaps(self) -> Tensor:
        """Returns [G, h, w] u8 of the whole image; memory grows with objects × pixels."""
        whole = self.pixels.new_zeros((len(self.places), *self.image_size))
        for bitmap, (x, y, crop) in zip(whole, self.crops(), strict=True):
            bitmap[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        return whole


def moved_tensors(value: T, move: Callable[[Tensor], Tensor]) -> T:
    """Copies nested dataclasses and lists, and replaces each tensor by the result of `move`."""
    if isinstance(value, Tensor):
        return move(value)  # type: ignore[return-value]
    if isinstance(value, list):
        return [moved_tensors(part, move) for part in value]  # type: ignore[return-value]
    if not is_dataclass(value):
        return value
    parts = {f.name: moved_tensors(getattr(value, f.name), move) for f in fields(value)}
    return replace(value, **parts)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The ground truth of one image with G objects and C crowd regions.

    Attributes:
        boxes: [G, 4] f32, the objects' boxes.
        crowds: [C, 4] f32, the crowds' boxes; objects in them are neither learnt nor background.
        labels: [G] i64 from 0.
        masks: G bitmaps in pixels of the image before it is resized; their `places` stay on the CPU.
        mask_scale: [4] f32, the factors from `boxes` to pixels of `masks`.
        seed: the seed of all random choices about this image in this step.
    """

    boxes: Tensor
    crowds: Tensor
    labels: Tensor
    masks: MaskCrops
    mask_scale: Tensor
    seed: int = 0

    def to(self, device: torch.device) -> Target:
        """Returns a copy on `device`."""
        places = self.masks.places  # which only the CPU reads
        return moved_tensors(self, lambda t: t if t is places else t.to(device, non_blocking=True))

    def generator(self) -> torch.Generator:
        """Returns this image's generator, which depends neither on the batch nor on the process."""
        return torch.Generator(self.boxes.device).manual_seed(self.seed)


Key = tuple[int, int]  # (epoch, index into the source)
Item = tuple[Tensor, tuple[int, int], Target, Id]  # canvas, size on the canvas, target, image id
_reported: set[str] = set()  # this process's messages about images, which contain file names


@dataclass(eq=False)
class TrainingSet(Dataset[Item]):
    """The images and targets of a source, prepared for the network but not batched.

    Attributes:
        source: the data set.
        indices: the images of `source` to use.
        preprocess: the settings of resize and padding.
        config: the settings of augmentation and repetition.
        seed: the seed of all random choices.
    """

    source: InstanceSource
    indices: list[int]
    preprocess: PreprocessConfig
    _: KW_ONLY
    config: DataConfig
    seed: int

    @cached_property
    def _label_of(self) -> dict[Id, int]:
        return {category.id: label for label, category in enumerate(self.source.categories)}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Item:
        """Returns canvas u8 [H, W, 3], size (h, w) on it, target and image id for (epoch, index).

        If an image cannot be decoded, the next one of the set that can takes its place, and a message
        says so once per process.

        Raises:
            ImageError: when no image of the set can be decoded.
        """
        epoch, index = key
        index, sample = self._sample(index)
        rng = np.random.default_rng([self.seed, epoch, index])
        sample, preprocess = augment(
            sample, self.config, self.preprocess, rng, partial(self._other, rng)
        )
        prepared = prepare(sample.pixels, preprocess)
        scale_y, scale_x = prepared.scale
        scale = torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float32)
        target = Target(
            boxes=torch.from_numpy(sample.boxes) * scale,
            crowds=torch.from_numpy(sample.crowds) * scale,
            labels=torch.tensor(sample.labels, dtype=torch.int64),
            masks=MaskCrops.of(sample.masks, sample.size),
            mask_scale=1 / scale,
            seed=int(rng.integers(2**62)),
        )
        return torch.from_numpy(prepared.canvas), prepared.size, target, self.source.info(index).id

    def _other(self, rng: Rng) -> Sample:
        """Returns a random image of the set."""
        return self._sample(self.indices[int(rng.integers(len(self.indices)))])[1]

    def _sample(self, index: int) -> tuple[int, Sample]:
        """Returns (index, image with its objects) of the image at `index` or the next decodable one."""
        index, pixels = self._next_decodable(index)
        info = self.source.info(index)
        boxes, crowds, labels, masks = [], [], [], list[Crop]()
        for annotation in self.source.annotations(index):
            x, y, w, h = annotation["bbox"]
            if annotation.get("iscrowd"):
                crowds.append([x, y, x + w, y + h])
                continue
            if w <= 0 or h <= 0:  # possible in sources that were not checked
                continue
            boxes.append([x, y, x + w, y + h])
            labels.append(self._label_of[annotation["category_id"]])
            mask = read_segmentation(annotation["segmentation"], info.height, info.width)
            masks.append(mask.crop())
        box, crowd = (np.array(b, dtype=np.float32).reshape(-1, 4) for b in (boxes, crowds))
        return index, Sample(pixels=pixels, boxes=box, crowds=crowd, labels=labels, masks=masks)

    @cached_property
    def repeats(self) -> NDArray[np.float64]:
        """How often an epoch has each image on average: [len(indices)], at least 1.

        With `data.repeat_threshold` t, a class that a share f of the images has asks for sqrt(t / f). An
        image has the largest value of its classes (Gupta et al., CVPR 2019).
        """
        threshold, count = self.config.repeat_threshold, len(self.indices)
        if not threshold:
            return np.ones(count)
        classes = [
            {a["category_id"] for a in self.source.annotations(i) if not a.get("iscrowd")}
            for i in self.indices
        ]
        images = Counter(class_ for present in classes for class_ in present)
        wanted = {c: math.sqrt(threshold * count / n) for c, n in images.items()}
        return np.array([max([1.0, *(wanted[c] for c in present)]) for present in classes])

    def times(self, rng: Rng) -> NDArray[np.int64]:
        """Rounds `repeats` down or up at random, so that their sum is the same in every epoch."""
        whole = np.floor(self.repeats).astype(np.int64)
        ends = np.cumsum(self.repeats - whole)
        more = int(ends[-1])
        # Equal steps above 1 find an image in proportion to its fraction, and at most once.
        places = (np.arange(more) + rng.random()) * (ends[-1] / max(more, 1))
        found = np.searchsorted(ends, places, side="right")
        return whole + np.bincount(found, minlength=len(whole))[: len(whole)]

    def epoch_length(self) -> int:
        """Returns the number of images of an epoch, in which an image may occur several times."""
        return int(self.times(np.random.default_rng(0)).sum())

    def _next_decodable(self, index: int) -> tuple[int, NDArray[np.uint8]]:
        """Returns (index, pixels) of the image at `index` or, cyclically, the next decodable one."""
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
                print(f"warning: {message}; training without it", file=sys.stderr, flush=True)
        return index, pixels
