"""Checks training on the GPU: a memorised batch, the loop, and the speed against torchvision's."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from context import Context
from kernel_values import TORCH
from rows import Check, Figure

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from comask.data.training_set import Target

SHARE = 0.5  # of the loss that may be left of a memorised batch
TIMED_BATCH = 2
HALF_AS_FAST = 0.5
WARM_UPS = 3
CLASSES = 80


def memorised(context: Context, *, precision: str) -> Figure:
    """Trains one batch again and again; its loss must fall far."""
    import torch

    from comask.models.comask import CoMask
    from comask.presets import preset
    from comask.training.losses import Objective
    from comask.training.optim import build_optimizer, set_learning_rate

    torch.manual_seed(0)
    config = preset("shapes-tiny")
    model = CoMask(config.model, config.preprocess).to(context.device).train()
    batch = 2 if context.rehearsal else 8
    images, sizes, targets = truth((96, 128), batch, 3, classes=8)
    moved = [t.to(context.device) for t in (images, sizes)], [t.to(context.device) for t in targets]
    optimizer, objective = build_optimizer(model, config.train), Objective(model)
    set_learning_rate(optimizer, 1e-3)
    losses = [
        _step(context, objective, optimizer, precision, *moved[0], moved[1])
        for _ in range(context.sizes.steps)
    ]
    first, last = float(losses[0]), float(torch.stack(losses[-3:]).mean())
    most = 0.9 if context.rehearsal else SHARE
    note = f"loss {first:.2f} to {last:.2f} in {len(losses)} steps"
    return Figure(value=last / first, unit="of the first loss", most=most, note=note)


def loop(context: Context) -> Figure:
    """Runs `comask train` for twenty steps with validation; the loss must fall and stay finite."""
    run, steps = context.folder / "training", 4 if context.rehearsal else 20
    context.command(
        "train", "--data", "shapes", "--preset", "shapes-tiny", "--output", str(run),
        "--set", f"train.max_steps={steps}", "--set", "train.precision=bf16",
        "--set", "data.shapes_train=64", "--set", "data.shapes_val=8",
    )  # fmt: skip
    with (run / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "train"]
    note = f"{len(losses)} rows"
    return Figure(value=losses[-1] / losses[0], unit="of the first loss", most=0.999, note=note)


def speed(context: Context) -> Figure:
    """Compares training steps with those of torchvision's Mask R-CNN: ResNet-50 and FPN, equal images.

    Both train all layers, sample as many anchors and RoIs, and use SGD and bf16 autocast.
    """
    import torch
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    from comask.models.comask import CoMask
    from comask.presets import preset
    from comask.training.losses import Objective

    torch.manual_seed(0)
    config = preset(context.sizes.preset)
    # as torchvision does without pretrained weights: all layers train, with BatchNorm
    model = replace(config.model, frozen_stages=0, backbone_norm="batch")
    size = (context.sizes.height, context.sizes.width)
    images, sizes, targets = truth(size, 2 if context.rehearsal else TIMED_BATCH, 8, classes=8)
    ours = CoMask(model, config.preprocess).to(context.device).train()
    theirs = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1,
        min_size=size[0], max_size=size[1],
        rpn_pre_nms_top_n_train=model.rpn_top_k_train, rpn_post_nms_top_n_train=model.proposals_train,
        rpn_batch_size_per_image=model.rpn_samples, box_batch_size_per_image=model.roi_samples,
        box_positive_fraction=model.roi_positive_fraction,
    ).to(context.device).train()  # fmt: skip
    images, sizes = images.to(context.device), sizes.to(context.device)
    planes = [image.permute(2, 0, 1).float() / 255 for image in images]
    on_device = [target.to(context.device) for target in targets]
    bitmaps = [
        {"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks.bitmaps()} for t in on_device
    ]
    rates = []
    for network, losses in (
        (ours, partial(Objective(ours), images, sizes, on_device)),
        (theirs, partial(theirs, planes, bitmaps)),
    ):
        network.to(memory_format=torch.channels_last)
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9)
        rates.append(len(images) / _seconds_per_step(context, losses, optimizer))
        del network, optimizer, trained
    note = f"{rates[0]:.1f} against {rates[1]:.1f} images/s at {size[0]}x{size[1]}, bf16"
    least = None if context.rehearsal else HALF_AS_FAST
    return Figure(value=rates[0] / rates[1], unit="times as fast", least=least, note=note)


def _step(
    context: Context, objective: Callable[..., dict[str, Tensor]], optimizer: Any, precision: str,
    *inputs: Any,
) -> Tensor:  # fmt: skip
    import torch

    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(context.device, torch.bfloat16, enabled=precision == "bf16"):
        loss = sum(objective(*inputs).values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    return loss.detach().float()


def _seconds_per_step(
    context: Context, losses: Callable[[], dict[str, Tensor]], optimizer: Any
) -> float:
    import torch

    steps = 1 if context.rehearsal else 10
    for step in range(steps + (0 if context.rehearsal else WARM_UPS)):
        if step == (0 if context.rehearsal else WARM_UPS):
            if not context.rehearsal:
                torch.cuda.synchronize()
            start = time.perf_counter()
        _step(context, losses, optimizer, "bf16")
    if not context.rehearsal:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def truth(
    size: tuple[int, int], batch: int, objects: int, *, classes: int
) -> tuple[Tensor, Tensor, list[Target]]:
    """Returns images of discs and squares with their objects, made without OpenCV and pycocotools.

    Args:
        size: (h, w) of the images in pixels.
        batch: the number of images.
        objects: the number of objects per image.
        classes: the number of classes.

    Returns:
        images u8 [B, h, w, 3], sizes i32 [B, 2], and a target for each image.
    """
    import torch

    from comask.data.training_set import MaskCrops, Target

    images, targets = [], []
    for seed in range(batch):
        rng = np.random.default_rng(seed)
        image: NDArray[Any] = rng.normal(120, 12, (*size, 3))
        crops, boxes, labels = [], [], []
        for place in range(objects):
            label, radius = (seed + place) % classes, int(rng.integers(10, min(size) // 4))
            y, x = (int(rng.integers(0, side - 2 * radius)) for side in size)
            grid = np.abs(np.mgrid[-radius:radius, -radius:radius] + 0.5)
            inside = (np.hypot(*grid) if label % 2 else grid.max(axis=0)) < radius
            part = image[y : y + 2 * radius, x : x + 2 * radius]
            part[inside] = 30 + 200 * np.array([label & 1, label >> 1 & 1, label >> 2 & 1])
            crops.append((x, y, inside))
            boxes.append([x, y, x + 2 * radius, y + 2 * radius])
            labels.append(label)
        images.append(image.clip(0, 255).astype(np.uint8))
        targets.append(
            Target(
                boxes=torch.tensor(boxes, dtype=torch.float32), crowds=torch.zeros(0, 4),
                labels=torch.tensor(labels), masks=MaskCrops.of(crops, size),
                mask_scale=torch.ones(4), seed=seed,
            )
        )  # fmt: skip
    sizes = torch.tensor([size] * batch, dtype=torch.int32)
    return torch.from_numpy(np.stack(images)), sizes, targets


def checks() -> list[Check]:
    """Returns the rows of the group."""
    needs = (TORCH, "torchvision")
    return [
        *(
            Check(
                name=f"a batch is memorised, {precision}", needs=needs, limit=45,
                run=partial(memorised, precision=precision), compared="the loss of the first step",
                fails=f"more than {SHARE:g} of it is left: a gradient is wrong, or precision lost",
            )
            for precision in ("bf16", "fp32")
        ),
        Check(
            name="training speed against torchvision's Mask R-CNN", run=speed, needs=needs, limit=60,
            compared="torchvision's maskrcnn_resnet50_fpn on the same images, in bf16 as well",
            fails=f"fewer than {HALF_AS_FAST:g} times as many images a second",
        ),
        Check(
            name="comask train, 20 steps with validation", run=loop, limit=90,
            needs=(*needs, "opencv", "pycocotools", "faster-coco-eval", "matplotlib", "click",
                   "safetensors"),
            compared="the loss of the first row", fails="it does not fall, or the loop fails on CUDA",
        ),
    ]  # fmt: skip
