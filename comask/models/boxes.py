"""Operations on boxes: clipping, IoU, and the (dx, dy, dw, dh) code relative to anchors.

All boxes are `xyxy`, f32, in pixels of the resized image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Larger values could overflow exp(); the limit is Faster R-CNN's.
MAX_LOG_SCALE = math.log(1000.0 / 16)


def clip_boxes(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Clips boxes [B, N, 4] to their images; `image_sizes` [B, 2] is (h, w) in pixels."""
    limits = image_sizes.to(boxes.dtype).flip(-1).repeat(1, 2)[:, None]  # w, h, w, h
    return torch.minimum(boxes.clamp(min=0), limits)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Returns the deltas [N, 4] from `anchors` to `boxes`, both [N, 4] (R-CNN, appendix C)."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = _centers(anchors), _centers(boxes)
    return torch.stack(
        ((bx - ax) / aw, (by - ay) / ah, torch.log(bw / aw), torch.log(bh / ah)), dim=-1
    )


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Applies deltas to anchors, the inverse of `encode_boxes`; the shapes [..., 4] broadcast."""
    ax, ay, aw, ah = _centers(anchors)
    dx, dy, dw, dh = deltas.unbind(-1)
    half_w = 0.5 * aw * torch.exp(dw.clamp(max=MAX_LOG_SCALE))
    half_h = 0.5 * ah * torch.exp(dh.clamp(max=MAX_LOG_SCALE))
    x, y = ax + dx * aw, ay + dy * ah
    return torch.stack((x - half_w, y - half_h, x + half_w, y + half_h), dim=-1)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Returns the IoU of box i of `a` with box i of `b`, shapes [..., 4] → [...], in 0..1."""
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    union = _area(a) + _area(b) - intersection
    return intersection / union.clamp(min=1e-6)


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Returns the generalised IoU of box i of `a` with box i of `b`, [..., 4] → [...], in -1..1.

    It is that of Rezatofighi et al., CVPR 2019.
    """
    iou = paired_iou(a, b)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    around = hull.prod(-1).clamp(min=1e-6)
    # The union follows from the IoU, since |a| + |b| = union + intersection = union · (1 + IoU).
    union = (_area(a) + _area(b)) / (1 + iou)
    return iou - (around - union) / around


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def _centers(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Converts `xyxy` to (center x, center y, width, height)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = x2 - x1, y2 - y1
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h
