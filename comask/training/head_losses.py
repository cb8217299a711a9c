"""Mask loss and dense box loss of the collaborative head (section 3.2; docs/algorithm.md, rows 12-17).

Legend: R positive RoIs of the batch. Boxes are f32 `xyxy` in pixels of the resized image.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from comask.data.target import Target
from comask.models.boxes import clip_boxes, paired_giou, paired_iou
from comask.models.collaboration import (
    CELLS,
    MASK_SIZE,
    POOL_SIZE,
    average_box,
    decode_cells,
    select_class,
)
from comask.models.comask import CoMask
from comask.training.rois import Rois, Term, pool_by_image
from comask.training.targets import choose, jitter, mask_targets


def head_losses(
    model: CoMask,
    pyramid: list[Tensor],
    image_sizes: Tensor,
    rois: list[Rois],
    targets: list[Target],
    generators: list[torch.Generator],
) -> tuple[Term, Term]:
    """The head on jittered positive RoIs, at most `head_rois` an image.

    Returns:
        binary cross-entropy of the object's class mask, mean over 28·28 (and over both passes, where the
        second one learns, too), counting RoIs; and the box loss of the cells by their weight, counting
        weights.
    """
    config = model.config
    boxes, labels, objects, masks, chosen = [], [], [], [], []
    for (positive, matched, _), (height, width), target, generator in zip(
        rois, image_sizes.tolist(), targets, generators, strict=True
    ):
        every = torch.arange(len(positive), device=positive.device)
        keep = choose(every, config.head_rois, generator)
        box = jitter(positive[keep], config.roi_jitter, height, width, generator)
        boxes.append(box)
        chosen.append(matched[keep])
        labels.append(target.labels[matched[keep]])
        objects.append(target.boxes[matched[keep]])
        masks.append(mask_targets(target, box, matched[keep], MASK_SIZE))
    label, mask_target = torch.cat(labels), torch.cat(masks)

    mask_logits, offsets = model.head(pool_by_image(model, pyramid, boxes, POOL_SIZE))
    mask_logits = select_class(mask_logits, label).float()
    mask_loss = _mask_loss(mask_logits, mask_target)

    flat = torch.cat(boxes)
    cell_boxes = decode_cells(offsets, flat)
    weights = _training_weights(model, mask_logits, mask_target)
    if config.train_refined_masks:
        with torch.no_grad():
            moved = average_box(cell_boxes, model.weigh_cells(mask_logits), flat)
            refined = [
                clip_boxes(b[None], size[None])[0]
                for b, size in zip(moved.split([len(b) for b in boxes]), image_sizes, strict=True)
            ]
        fine_target = torch.cat(
            [mask_targets(*args, MASK_SIZE) for args in zip(targets, refined, chosen, strict=True)]
        )
        fine_head = model.fine_head or model.head
        fine, _ = fine_head(pool_by_image(model, pyramid, refined, POOL_SIZE))
        fine_loss = _mask_loss(select_class(fine, label).float(), fine_target)
        mask_loss = (mask_loss + fine_loss) / 2  # a sum would double the mask's weight
    count = mask_loss.new_tensor(float(len(label)))
    box_loss = dense_box_loss(cell_boxes, torch.cat(objects), weights, config.box_loss)
    return Term(mask_loss, count), box_loss


def _mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / MASK_SIZE**2


def _training_weights(model: CoMask, mask_logits: Tensor, mask_target: Tensor) -> Tensor:
    """How much each cell [R, 7, 7] learns: by the object's mask over it, or by the predicted one.

    Where all cells vote alike, all learn alike.
    """
    kind = model.config.cell_targets
    if kind == "pred" or model.config.collaboration == "uniform":
        return model.weigh_cells(mask_logits.detach())
    pooled = F.avg_pool2d(mask_target[:, None], MASK_SIZE // CELLS)[:, 0]
    return pooled if kind == "soft" else (pooled > 0.5).float()


def dense_box_loss(
    cell_boxes: Tensor, truth: Tensor, weights: Tensor, kind: Literal["iou", "giou"] = "iou"
) -> Term:
    """Σ w·(-log IoU) over the cells of all RoIs, counting Σ w (UnitBox, with D2Det's floor).

    An IoU of at most 0.1 counts 0.1 more, which bounds the loss and keeps its gradient. With `giou`
    the loss of a cell is 1 - GIoU.

    Args:
        cell_boxes: [R, 7, 7, 4].
        truth: [R, 4], each RoI's object.
        weights: [R, 7, 7] ≥ 0; upstream code lost them in a broadcast, here they count.
        kind: of loss.
    """
    goal = truth[:, None, None].expand_as(cell_boxes)
    if kind == "giou":
        loss = 1 - paired_giou(cell_boxes, goal)
    else:
        iou = paired_iou(cell_boxes, goal)
        loss = -torch.log(torch.where(iou <= 0.1, iou + 0.1, iou))
    return Term((loss * weights).sum(), weights.sum())
