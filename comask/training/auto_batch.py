"""Finds how many images fit into the GPU's memory, for `train.batch_size=auto`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import deepcopy

import torch

from comask.config import Config
from comask.data.training_set import MaskCrops, Target
from comask.errors import ConfigError, TrainingError
from comask.models.comask import CoMask
from comask.training.losses import Objective
from comask.training.optim import build_optimizer

MOST = 256  # images of a process; more never help
SHARE = 0.85  # of the memory that may be used, since images with many objects need more than the trial's
OBJECTS = 20  # of an image in the trial; an image of COCO has 7 on average


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """Returns the largest number up to `most` that fits; 0 if not even 1 does.

    Args:
        fits: whether a number fits; if one fits, so does every smaller one.
        most: the largest number to try.
    """
    good, bad = 0, most + 1
    tried = 1
    while bad - good > 1:
        if fits(tried):
            good = tried
        else:
            bad = tried
        tried = min(2 * good, most) if bad > most else (good + bad) // 2
    return good


def find_batch_size(model: CoMask, config: Config) -> int:
    """Returns the number of images of a process by trials on the largest canvas.

    Args:
        model: the network on its GPU, which stays unchanged.
        config: the run's settings.

    Raises:
        ConfigError: the network is not on a GPU.
        TrainingError: not even one image fits.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ConfigError(
            "train.batch_size=auto: needs a GPU, whose memory it measures; on a CPU give a number"
        )
    found = largest(lambda images: _fits(model, config, images))
    if not found:
        raise TrainingError(
            "train.batch_size=auto: not even one image fits; set train.precision=bf16, "
            "train.checkpoint_activations=true or a smaller preprocess.max_side"
        )
    return found


def _fits(model: CoMask, config: Config, images: int) -> bool:
    """Trains a copy of the network for one step on random images with random objects."""
    device, train = next(model.parameters()).device, config.train
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        copy = deepcopy(model).train()
        optimizer = build_optimizer(copy, train)
        canvas, sizes, targets = trial(config, images)
        dtype = torch.float16 if train.precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, dtype, enabled=train.precision != "fp32"):
            losses = Objective(copy)(
                canvas.to(device), sizes.to(device), [t.to(device) for t in targets]
            )
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return torch.cuda.max_memory_reserved(device) <= SHARE * total
    except torch.OutOfMemoryError:
        return False
    finally:
        copy = optimizer = losses = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()


def trial(config: Config, images: int) -> tuple[torch.Tensor, torch.Tensor, list[Target]]:
    """Returns random images on the largest canvas, their sizes, and random objects."""
    multiple = config.preprocess.pad_multiple
    height, width = (
        -(-side // multiple) * multiple
        for side in (config.preprocess.short_side, config.preprocess.max_side)
    )
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (images, height, width, 3), generator=generator).to(torch.uint8)
    sizes = torch.tensor([[height, width]] * images, dtype=torch.int32)
    targets = []
    for seed in range(images):
        centres = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([width, height])
        halves = 8 + torch.rand(OBJECTS, 2, generator=generator) * min(height, width) / 4
        corners = torch.cat([centres - halves, centres + halves], 1)
        most = torch.tensor([width, height, width, height])
        boxes = torch.minimum(corners.clamp(min=0), most).round()
        crops = [
            (int(x1), int(y1), torch.ones(int(y2 - y1), int(x2 - x1), dtype=torch.bool).numpy())
            for x1, y1, x2, y2 in boxes.tolist()
        ]
        targets.append(
            Target(
                boxes=boxes,
                crowds=torch.zeros(0, 4),
                labels=torch.arange(OBJECTS) % config.model.num_classes,
                masks=MaskCrops.of(crops, (height, width)),
                mask_scale=torch.ones(4),
                seed=seed,
            )
        )
    return canvas, sizes, targets
