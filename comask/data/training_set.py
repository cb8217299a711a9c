"""What the training loop iterates over: resized, flipped, padded batches of images of like shape.

Everything random is a function of (seed, epoch, image), never of the worker or the order in which
images are loaded, so a resumed run sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from comask.config import PreprocessConfig
from comask.data.source import InstanceSource
from comask.data.target import Target
from comask.errors import ImageError, one_line
from comask.masks import mask_from_segmentation
from comask.preprocess import prepare

Key = tuple[int, int]  # (epoch, index into the source)
Item = tuple[Tensor, tuple[int, int], Target, int]  # canvas, size on it, target, image id
_reported: set[str] = set()  # this process's messages about images, which name their files


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images on one canvas.

    Attributes:
        images: u8 [B, H, W, 3] RGB.
        image_sizes: i32 [B, 2], (h, w) in pixels of each image on the canvas.
        targets: one an image.
        image_ids: the data set's ids.
    """

    images: Tensor
    image_sizes: Tensor
    targets: list[Target]
    image_ids: list[int]

    def pin_memory(self) -> Batch:
        """What a loader calls where there is a GPU; see `Target.pin_memory`."""
        return Batch(
            images=self.images.pin_memory(),
            image_sizes=self.image_sizes.pin_memory(),
            targets=[target.pin_memory() for target in self.targets],
            image_ids=self.image_ids,
        )


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
        boxes, labels, masks = [], [], []
        for annotation in self.source.annotations(index):
            x, y, w, h = annotation["bbox"]
            if annotation.get("iscrowd") or w <= 0 or h <= 0:
                continue
            boxes.append([x, y, x + w, y + h])
            labels.append(self._label_of[annotation["category_id"]])
            masks.append(
                mask_from_segmentation(annotation["segmentation"], info.height, info.width)
            )
        box = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        mask = np.array(masks, dtype=np.uint8).reshape(-1, info.height, info.width)
        rng = np.random.default_rng([self._seed, epoch, index])
        if rng.random() < self._flip_probability:
            pixels, mask = np.ascontiguousarray(pixels[:, ::-1]), mask[:, :, ::-1].copy()
            box[:, [0, 2]] = info.width - box[:, [2, 0]]
        prepared = prepare(pixels, self._preprocess)
        scale_y, scale_x = prepared.scale
        scale = torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float32)
        target = Target(
            boxes=torch.from_numpy(box) * scale,
            labels=torch.tensor(labels, dtype=torch.int64),
            masks=torch.from_numpy(mask),
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


def epoch_batches(
    dataset: TrainingSet, batch_size: int, seed: int, epoch: int, *, ranks: int = 1
) -> list[list[Key]]:
    """One epoch's batches: each image once, landscape and portrait images apart.

    What is left of both at the end shares batches, padded; only the last may be smaller. Images of
    the epoch's start fill that one up to a multiple of `ranks`, so that every process has its share.
    """
    rng = np.random.default_rng([seed, epoch])
    order = [dataset.indices[i] for i in rng.permutation(len(dataset.indices))]
    groups: dict[bool, list[Key]] = {False: [], True: []}
    batches, rest = [], []
    for index in order:
        info = dataset.source.info(index)
        group = groups[info.width >= info.height]
        group.append((epoch, index))
        if len(group) == batch_size:
            batches.append(group.copy())
            group.clear()
    rest = groups[False] + groups[True]
    missing = -len(rest) % ranks
    rest += [(epoch, order[i % len(order)]) for i in range(missing)]
    batches += [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(batch: list[Key], size: int, rank: int, ranks: int) -> list[list[Key]]:
    """One process's share of a batch, in parts of at most `size` images (0: in one)."""
    share = batch[rank::ranks]
    size = size or len(share)
    return [share[i : i + size] for i in range(0, len(share), size)]


def load_batches(
    dataset: TrainingSet, batches: list[list[Key]], *, workers: int
) -> Iterator[Batch]:
    """The given batches in order, loaded by that many processes (0: by this one)."""
    loader: DataLoader[Item] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    yield from loader


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole group; the parent still needs its batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def collate(items: list[Item]) -> Batch:
    """Images of differing canvases on one that holds them all."""
    height = max(canvas.shape[0] for canvas, _, _, _ in items)
    width = max(canvas.shape[1] for canvas, _, _, _ in items)
    images = torch.zeros((len(items), height, width, 3), dtype=torch.uint8)
    for image, (canvas, _, _, _) in zip(images, items, strict=True):
        image[: canvas.shape[0], : canvas.shape[1]] = canvas
    return Batch(
        images=images,
        image_sizes=torch.tensor([size for _, size, _, _ in items], dtype=torch.int32),
        targets=[target for _, _, target, _ in items],
        image_ids=[image_id for _, _, _, image_id in items],
    )
