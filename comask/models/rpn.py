"""The region proposal network (Ren et al., NIPS 2015) on P2..P6, with a fixed number of proposals.

Legend: B batch, A anchors per place, L levels, K candidates per level, N proposals per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comask.kernels.launch import LEVEL_STRIDES
from comask.models.boxes import clip_boxes, decode_boxes
from comask.models.nms import sorted_nms, top_k
from comask.models.precision import FloatTensors

STRIDES = (*LEVEL_STRIDES.values(), 64)  # P2..P6
# A score of 0 marks padding. Sigmoids round to 0 at different logits (ONNX Runtime's at -18), so the
# scores of proposals must stay well above 0.
MIN_SCORE = 1e-6
MIN_SIDE = 1e-3  # pixels; proposals that clipping makes thinner are dropped


def base_anchors(size: float, ratios: tuple[float, ...]) -> Tensor:
    """Returns [A, 4], boxes of area size² around the origin, one per height:width ratio, rounded."""
    ratio = torch.tensor(ratios)
    h = size * torch.sqrt(ratio)
    w = size / torch.sqrt(ratio)
    return (torch.stack((-w, -h, w, h), dim=1) / 2).round()


def level_anchors(base: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Returns all anchors of one level.

    Args:
        base: [A, 4], boxes around the origin.
        height, width: the level's size; place (i, j) is centred on pixel (j, i) × stride.
        stride: 4 to 64, independent of the image's size.

    Returns:
        [height·width·A, 4] in row, column, anchor order.
    """
    x = torch.arange(width, device=base.device, dtype=base.dtype) * stride
    y = torch.arange(height, device=base.device, dtype=base.dtype) * stride
    grid_y = y[:, None].expand(height, width)
    grid_x = x[None, :].expand(height, width)
    shifts = torch.stack((grid_x, grid_y, grid_x, grid_y), dim=-1)  # [height, width, 4]
    return (shifts[:, :, None] + base).reshape(-1, 4)


class LevelOutput(NamedTuple):
    """The RPN's output for one level with n = H·W·A anchors.

    Attributes:
        logits: [B, n] f32, objectness.
        deltas: [B, n, 4] f32 in the code of `comask.models.boxes.encode_boxes`.
        anchors: [n, 4] f32 `xyxy` in pixels of the resized image.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor


class RPN(FloatTensors):
    """A 3×3 convolution, then objectness and box deltas at every place; all levels share the weights."""

    base_anchors: Tensor

    def __init__(
        self, channels: int, anchor_sizes: tuple[float, ...], anchor_ratios: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, len(anchor_ratios), 1)
        self.deltas = nn.Conv2d(channels, 4 * len(anchor_ratios), 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        bases = torch.stack([base_anchors(size, anchor_ratios) for size in anchor_sizes])
        self.register_buffer("base_anchors", bases, persistent=False)

    def forward(self, pyramid: list[Tensor]) -> list[LevelOutput]:
        """Maps P2..P6, each [B, C, H/stride, W/stride], to one `LevelOutput` per level."""
        outputs = []
        for features, base, stride in zip(pyramid, self.base_anchors, STRIDES, strict=True):
            hidden = F.relu(self.conv(features))
            logits = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)
            deltas = self.deltas(hidden).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)
            anchors = level_anchors(base, features.shape[2], features.shape[3], stride)
            outputs.append(LevelOutput(logits.float(), deltas.flatten(1, 3).float(), anchors))
        return outputs


def proposals_from_levels(
    levels: list[LevelOutput],
    image_sizes: Tensor,
    *,
    candidates_per_level: int,
    num_proposals: int,
    nms_iou: float,
) -> tuple[Tensor, Tensor]:
    """Selects proposals: per level the top K after NMS, then the top N of all levels.

    Boxes are ranked by logit, because saturated probabilities are equal.

    Args:
        levels: the outputs for P2..P6.
        image_sizes: [B, 2], (h, w) in pixels of each image inside the padded canvas.
        candidates_per_level: K, the number of candidates per level.
        num_proposals: N, the number of proposals per image; fewer are returned when L·K is smaller.
        nms_iou: overlap above which the lower-ranked box of a level is dropped.

    Returns:
        Proposals [B, N, 4] f32 `xyxy` in pixels, inside their image, and scores [B, N] f32 in 1e-6..1,
        by falling score. A score of 0 marks padding, whose box is zeros.
    """
    k = candidates_per_level
    best = [_level_candidates(level, image_sizes, k) for level in levels]
    boxes = torch.stack([boxes for boxes, _ in best], dim=1)  # [B, L, K, 4]
    logits = torch.stack([logits for _, logits in best], dim=1)
    one_group = torch.zeros_like(logits, dtype=torch.int32).flatten(0, 1)
    keep = sorted_nms(boxes.flatten(0, 1), one_group, nms_iou).unflatten(0, (-1, len(levels)))
    logits = logits.masked_fill(~keep, -torch.inf).flatten(1)
    logits, order = top_k(logits, min(num_proposals, len(levels) * k))
    boxes = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))
    valid = ~torch.isneginf(logits)
    scores = torch.where(valid, torch.sigmoid(logits).clamp(min=MIN_SCORE), 0.0)
    return torch.where(valid[..., None], boxes, 0.0), scores


def _level_candidates(level: LevelOutput, image_sizes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k best boxes [B, k, 4] of one level and their logits [B, k], -inf for padding."""
    # k entries are appended, so that k need not shrink for levels with fewer anchors.
    none = level.logits.new_full((level.logits.shape[0], k), -torch.inf)
    logits, order = top_k(torch.cat((level.logits, none), dim=1), k)
    order = order.clamp(max=level.anchors.shape[0] - 1)
    deltas = level.deltas.gather(1, order[..., None].expand(-1, -1, 4))
    boxes = clip_boxes(decode_boxes(deltas, level.anchors[order]), image_sizes)
    side = (boxes[..., 2:] - boxes[..., :2]).amin(-1)
    empty = (side < MIN_SIDE) | torch.isneginf(logits)
    # Boxes of zeros overlap nothing, so that they cannot suppress other boxes.
    boxes = torch.where(empty[..., None], 0.0, boxes)
    return boxes, logits.masked_fill(empty, -torch.inf)
