"""Hypothesis strategies, random boxes, a small network and small targets: what test files share."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from comask.config import ModelConfig
from comask.data.training_set import MaskCrops, Target
from comask.models.comask import CoMask
from comask.models.mask_scoring import MaskScorer
from comask.presets import PRESETS
from comask.training.losses import Rois

FEW = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**31 - 1)
thresholds = st.floats(0, 1, exclude_max=True)


def arrays(*shape: int, low: float = 0.0, high: float = 1.0) -> st.SearchStrategy[Tensor]:
    """f32 tensors; the bounds must be exact in f32."""
    elements = st.floats(low, high, width=32)
    return hnp.arrays(np.float32, shape, elements=elements).map(torch.from_numpy)


def boxes(count: int, size: float = 500.0, min_side: float = 1.0) -> st.SearchStrategy[Tensor]:
    """[count, 4] f32 `xyxy` with a corner in 0..size and sides in min_side..min_side + size."""

    def build(unit: Tensor) -> Tensor:
        corner = unit[:, :2] * size
        return torch.cat((corner, corner + min_side + unit[:, 2:] * size), dim=1)

    return arrays(count, 4).map(build)


def random_boxes(generator: torch.Generator, count: int, size: float, side: float) -> Tensor:
    """[count, 4] with a corner in 0..size and sides in 1..side + 1."""
    corner = torch.rand(count, 2, generator=generator) * size
    return torch.cat((corner, corner + 1 + torch.rand(count, 2, generator=generator) * side), dim=1)


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny_config(**changes: Any) -> ModelConfig:
    """The preset `shapes-tiny`, smaller still."""
    small: dict[str, Any] = {
        "channels": 32,
        "head_channels": 32,
        "norm_groups": 8,
        "classifier_width": 64,
        "head_convs": 1,
        "rpn_top_k": 30,
        "rpn_top_k_train": 60,
        "proposals": 40,
        "proposals_train": 60,
        "detections": 16,
        "score_threshold": 0.0,
    }
    return replace(PRESETS["shapes-tiny"].model, **(small | changes))


@cache
def _network() -> CoMask:
    torch.manual_seed(7)
    model = CoMask(tiny_config(), PRESETS["shapes-tiny"].preprocess).eval()
    with torch.no_grad():
        for layer, std in (
            (model.rpn.objectness, 0.5),
            (model.rpn.deltas, 0.05),
            (model.classifier.logits, 0.5),
            (model.head.offsets, 0.05),
            (model.head.mask, 0.3),
            *((module.reduce, 0.1) for module in model.mfpn.modules_per_level),
            *((module.attention.excite, 0.1) for module in model.mfpn.modules_per_level),
        ):
            layer.weight.normal_(std=std)
    return model


def tiny_model(**changes: Any) -> CoMask:
    """A network whose outputs differ from place to place, unlike those of a fresh one.

    `changes` to its configuration must leave its other layers than `mask_scoring`'s alone.
    """
    model = deepcopy(_network())
    model.config = tiny_config(**changes)
    if model.config.mask_scoring:
        torch.manual_seed(8)
        model.mask_scorer = MaskScorer(model.config).eval()
        model.mask_scorer.iou.weight.detach().normal_(std=0.5)
    return model


def noise_images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """u8 [B, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)


def cropped(bitmaps: Tensor) -> MaskCrops:
    """[G, h, w] bitmaps of whole images, as a training set packs them."""
    crops = []
    for bitmap in bitmaps.numpy().astype(bool):
        rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
        if not len(rows):
            crops.append((0, 0, np.zeros((0, 0), bool)))
            continue
        (y1, y2), (x1, x2) = rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
        crops.append((x1, y1, np.ascontiguousarray(bitmap[y1 : y2 + 1, x1 : x2 + 1])))
    return MaskCrops.of(crops, (bitmaps.shape[1], bitmaps.shape[2]))


def target(boxes: list[list[float]], labels: list[int]) -> Target:
    """Ellipses in boxes; bitmaps have twice the pixels in x."""
    x, y = torch.meshgrid(torch.arange(256) / 2, torch.arange(96.0), indexing="xy")
    masks = [
        ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
        for x1, y1, x2, y2 in boxes
    ]
    return Target(
        boxes=torch.tensor(boxes).reshape(-1, 4),
        crowds=torch.zeros(0, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=cropped(torch.stack([*masks, torch.zeros(96, 256)])[:-1].to(torch.uint8)),
        mask_scale=torch.tensor([2.0, 1.0, 2.0, 1.0]),
    )


EMPTY = target([], [])
FULL = target([[10.0, 10, 60, 50], [70, 20, 120, 90], [5, 60, 30, 90]], [3, 0, 7])
ONE = target([[20.0, 15, 90, 70]], [5])
SIZES = torch.tensor([[96, 128], [80, 100]], dtype=torch.int32)


def rois_of(model: CoMask) -> tuple[list[Tensor], list[Rois], list[Target]]:
    """Positives near their objects in differing numbers, background, and the maps they read."""
    with torch.no_grad():
        pyramid = model.pyramid(noise_images(2, 96, 128), SIZES)
    places = torch.tensor([0, 2, 1, 1])
    near = FULL.boxes[places] + torch.tensor([[2.0, -3, 4, 1], [1, 1, 1, 1], [3, 0, 0, 2], [0] * 4])
    background = torch.tensor([[0.0, 0, 8, 8], [90, 0, 110, 12], [64, 0, 128, 20]])
    rois = [
        Rois(near, places, background),
        Rois(ONE.boxes + torch.tensor([4.0, 4, 4, 4]), torch.tensor([0]), background[:1]),
    ]
    return pyramid, rois, [FULL, ONE]
