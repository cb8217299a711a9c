"""The losses of CoMask: RPN, classification, masks and dense boxes (docs/algorithm.md, table).

Every loss is a finite number with a gradient for all of its parameters, also for a batch without a
single object, so that no rank of a distributed run waits for another.

Legend: B batch, R positive RoIs of the batch, K classes. Boxes are f32 `xyxy` in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from comask.config import ModelConfig
from comask.models.boxes import clip_boxes, encode_boxes, paired_iou
from comask.models.classifier import POOL_SIZE as CLASSIFIER_POOL
from comask.models.collaboration import (
    CELLS,
    MASK_SIZE,
    average_box,
    decode_cells,
    select_class,
)
from comask.models.collaboration import (
    POOL_SIZE as HEAD_POOL,
)
from comask.models.comask import CoMask
from comask.models.roi_align import pool_rows
from comask.models.rpn import LevelOutput, proposals_from_levels
from comask.training.targets import Target, jitter, mask_targets, match, sample


class Objective(nn.Module):
    """The model with its losses: one call a training step (and what DDP wraps)."""

    def __init__(self, model: CoMask) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, image_sizes: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is what to minimise.

        Args:
            images: u8 [B, H, W, 3].
            image_sizes: i32 [B, 2] (h, w).
            targets: one an image.
        """
        model, config = self.model, self.model.config
        pyramid = model.pyramid(images, image_sizes)
        levels = model.rpn(pyramid)
        objectness, anchor_box = rpn_losses(levels, targets, config)
        with torch.no_grad():
            proposals, scores = proposals_from_levels(
                levels,
                image_sizes,
                candidates_per_level=config.rpn_top_k_train,
                num_proposals=config.proposals_train,
                nms_iou=config.rpn_nms_iou,
            )
        rois = [
            assign_rois(boxes[score > 0], target, config)
            for boxes, score, target in zip(proposals, scores, targets, strict=True)
        ]
        mask, box = head_losses(model, pyramid, image_sizes, rois, targets)
        return {
            "rpn_objectness": objectness * config.rpn_objectness_weight,
            "rpn_box": anchor_box * config.rpn_box_weight,
            "class": classification_loss(model, pyramid, rois, targets) * config.class_weight,
            "mask": mask * config.mask_weight,
            "box": box * config.box_weight,
        }


def rpn_losses(
    levels: list[LevelOutput], targets: list[Target], config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of sampled anchors, and smooth-L1 (β = 1/9) of the positive ones' deltas.

    Both are divided by the number of sampled anchors, as in Faster R-CNN.
    """
    logits = torch.cat([level.logits for level in levels], dim=1)
    deltas = torch.cat([level.deltas for level in levels], dim=1)
    anchors = torch.cat([level.anchors for level in levels])
    wanted_logits, wanted, sampled_deltas, wanted_deltas = [], [], [], []
    for i, target in enumerate(targets):
        matches = match(
            box_iou(target.boxes, anchors),
            config.rpn_positive_iou,
            config.rpn_negative_iou,
            keep_best=True,
        )
        positive, negative = sample(matches, config.rpn_samples, config.rpn_positive_fraction)
        wanted_logits.append(logits[i, torch.cat((positive, negative))])
        wanted += [logits.new_ones(len(positive)), logits.new_zeros(len(negative))]
        sampled_deltas.append(deltas[i, positive])
        wanted_deltas.append(encode_boxes(target.boxes[matches[positive]], anchors[positive]))
    chosen = torch.cat(wanted_logits)
    objectness = F.binary_cross_entropy_with_logits(chosen, torch.cat(wanted))
    box = F.smooth_l1_loss(
        torch.cat(sampled_deltas), torch.cat(wanted_deltas), beta=1 / 9, reduction="sum"
    )
    return objectness, box / max(len(chosen), 1)


def assign_rois(
    proposals: Tensor, target: Target, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The RoIs of one image that train both branches: sampled proposals and the objects themselves.

    Returns:
        positive RoIs [P, 4], their objects [P] i64 (index into the target), negative RoIs [Q, 4].
    """
    candidates = torch.cat((proposals, target.boxes))
    iou = box_iou(target.boxes, candidates)
    matches = match(iou, config.roi_positive_iou, config.roi_positive_iou, keep_best=False)
    positive, negative = sample(matches, config.roi_samples, config.roi_positive_fraction)
    return candidates[positive], matches[positive], candidates[negative]


def classification_loss(
    model: CoMask,
    pyramid: list[Tensor],
    rois: list[tuple[Tensor, Tensor, Tensor]],
    targets: list[Target],
) -> Tensor:
    """Cross-entropy over K classes and background, mean over all sampled RoIs."""
    boxes, classes = [], []
    for (positive, objects, negative), target in zip(rois, targets, strict=True):
        boxes.append(torch.cat((positive, negative)))
        background = objects.new_zeros(len(negative))
        classes.append(torch.cat((target.labels[objects] + 1, background)))
    logits: Tensor = model.classifier(_pool(model, pyramid, boxes, CLASSIFIER_POOL))
    if len(logits) == 0:
        return logits.sum()
    loss: Tensor = F.cross_entropy(logits.float(), torch.cat(classes))
    return loss


def head_losses(
    model: CoMask,
    pyramid: list[Tensor],
    image_sizes: Tensor,
    rois: list[tuple[Tensor, Tensor, Tensor]],
    targets: list[Target],
) -> tuple[Tensor, Tensor]:
    """Mask loss and dense box loss of the collaborative head, on jittered positive RoIs.

    Returns:
        binary cross-entropy of the object's class mask, mean over R·28·28; and -log IoU of each
        foreground cell's box with its object, mean over those cells.
    """
    config = model.config
    chosen = _subset([len(positive) for positive, _, _ in rois], config.head_rois)
    boxes, labels, objects, masks = [], [], [], []
    for (positive, matched, _), keep, size, target in zip(
        rois, chosen, image_sizes.tolist(), targets, strict=True
    ):
        keep = keep.to(positive.device)
        box, match_of = jitter(positive[keep], config.roi_jitter, *size), matched[keep]
        boxes.append(box)
        labels.append(target.labels[match_of])
        objects.append(target.boxes[match_of])
        masks.append(mask_targets(target, box, match_of, MASK_SIZE))
    label, truth, mask_target = torch.cat(labels), torch.cat(objects), torch.cat(masks)

    mask_logits, offsets = model.head(_pool(model, pyramid, boxes, HEAD_POOL))
    if len(label) == 0:
        return mask_logits.sum(), offsets.sum()
    mask_logits = select_class(mask_logits, label).float()
    mask_loss = F.binary_cross_entropy_with_logits(mask_logits, mask_target)

    flat = torch.cat(boxes)
    cell_boxes = decode_cells(offsets, flat)
    pooled = F.avg_pool2d(mask_target[:, None], MASK_SIZE // CELLS)[:, 0]
    box_loss = dense_box_loss(cell_boxes, truth, (pooled > 0.5).float())
    if config.train_refined_masks:
        with torch.no_grad():
            weights = model.weigh_cells(mask_logits)
            moved = average_box(cell_boxes, weights, flat).split([len(b) for b in boxes])
            refined = [
                clip_boxes(b[None], size[None])[0]
                for b, size in zip(moved, image_sizes, strict=True)
            ]
        matches = [m[k.to(m.device)] for (_, m, _), k in zip(rois, chosen, strict=True)]
        fine_target = torch.cat(
            [mask_targets(*args, MASK_SIZE) for args in zip(targets, refined, matches, strict=True)]
        )
        fine, _ = model.head(_pool(model, pyramid, refined, HEAD_POOL))
        fine = select_class(fine, label).float()
        mask_loss = mask_loss + F.binary_cross_entropy_with_logits(fine, fine_target)
    return mask_loss, box_loss


def dense_box_loss(cell_boxes: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Σ w·(-log IoU) / Σ w over the cells of all RoIs (UnitBox, with D2Det's floor).

    An IoU of at most 0.1 counts 0.1 more, which bounds the loss and keeps its gradient.

    Args:
        cell_boxes: [R, 7, 7, 4].
        truth: [R, 4], each RoI's object.
        weights: [R, 7, 7] ≥ 0; upstream code lost them in a broadcast, here they count.
    """
    iou = paired_iou(cell_boxes, truth[:, None, None].expand_as(cell_boxes))
    iou = torch.where(iou <= 0.1, iou + 0.1, iou)
    loss: Tensor = (-torch.log(iou) * weights).sum() / weights.sum().clamp(min=1.0)
    return loss


def _subset(counts: list[int], limit: int) -> list[Tensor]:
    """For each image, which of its positives train the head: `limit` of the batch, at random."""
    keep = torch.randperm(sum(counts))[:limit]
    flags = torch.zeros(sum(counts), dtype=torch.bool)
    flags[keep] = True
    return list(flags.split(counts))


def _pool(model: CoMask, pyramid: list[Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """RoIs by image, of differing number → features [ΣR, C, size, size] in the same order."""
    rows = torch.cat([F.pad(b, (1, 0), value=image) for image, b in enumerate(boxes)])
    config = model.config
    return pool_rows(pyramid, rows, size, config.roi_sampling_ratio, config.roi_canonical_size)
