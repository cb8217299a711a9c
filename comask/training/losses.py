"""The losses of CoMask: RPN, classification, coarse masks and dense boxes (section 3.2).

Each loss is a sum over items of the batch (anchors, RoIs, cells) divided by their number. The number is
counted on all processes together, so that several processes compute what one would compute with all of
their images. Even for a batch without objects, each loss is finite and has a gradient for all of its
parameters, so that no process waits for another.

Legend: B batch, R positive RoIs of the batch, K classes. Boxes are f32 `xyxy` in pixels of the resized
image. Rows of docs/algorithm.md: 12 to 17.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from comask.config import ModelConfig
from comask.data.training_set import Target
from comask.models.box_refinement import (
    CELLS,
    MASK_SIZE,
    POOL_SIZE,
    average_box,
    decode_cells,
)
from comask.models.boxes import clip_boxes, encode_boxes, paired_giou, paired_iou
from comask.models.classifier import DELTA_SCALE
from comask.models.classifier import POOL_SIZE as CLASSIFIER_POOL
from comask.models.comask import CoMask
from comask.models.roi_align import pool_rows
from comask.models.rpn import LevelOutput, proposals_from_levels
from comask.training.distributed import mean_over_ranks
from comask.training.targets import (
    choose,
    jitter,
    mask_iou,
    mask_targets,
    match,
    sample,
    without_crowds,
)

Generators = list[torch.Generator]


class Term(NamedTuple):
    """A loss before normalisation: a sum over items and the number of items, both f32 scalars."""

    total: Tensor
    items: Tensor


class Rois(NamedTuple):
    """The RoIs of one image that train the heads.

    Attributes:
        positive: RoIs that match an object, [P, 4].
        objects: [P] i64, the object of each positive RoI, as an index into the target.
        negative: RoIs of the background, [Q, 4].
    """

    positive: Tensor
    objects: Tensor
    negative: Tensor


def pool_by_image(model: CoMask, pyramid: list[Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """Pools the RoIs of several images to features [ΣR, C, size, size], in the same order."""
    rows = torch.cat([F.pad(b, (1, 0), value=image) for image, b in enumerate(boxes)])
    config = model.config
    return pool_rows(pyramid, rows, size, config.roi_sampling_ratio, config.roi_canonical_size)


class Objective(nn.Module):
    """The model with its losses: the module that each training step calls, and that DDP wraps."""

    def __init__(self, model: CoMask) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, image_sizes: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Returns the weighted losses by name; training minimises their sum.

        Args:
            images: u8 [B, H, W, 3].
            image_sizes: i32 [B, 2] (h, w).
            targets: a target for each image.
        """
        model, config = self.model, self.model.config
        generators = [target.generator() for target in targets]
        pyramid = model.pyramid(images, image_sizes)
        levels = model.rpn(pyramid)
        objectness, anchor_box = rpn_losses(levels, targets, config, generators)
        with torch.no_grad():
            proposals, scores = proposals_from_levels(
                levels,
                image_sizes,
                candidates_per_level=config.rpn_top_k_train,
                num_proposals=config.proposals_train,
                nms_iou=config.rpn_nms_iou,
            )
        rois = [
            assign_rois(boxes[score > 0], target, config, generator)
            for boxes, score, target, generator in zip(
                proposals, scores, targets, generators, strict=True
            )
        ]
        classes, regressed = classification_losses(model, pyramid, rois, targets)
        terms = {
            "rpn_objectness": objectness,
            "rpn_box": anchor_box,
            "class": classes,
            **head_losses(model, pyramid, image_sizes, rois, targets, generators),
        }
        if regressed:
            terms["box"] = regressed
        items = torch.stack([term.items for term in terms.values()])
        # DDP averages gradients over processes, so each process divides by the mean number.
        share = mean_over_ranks(items)
        counts = torch.where(share > 0, share, 1.0)
        # The mask's score has no setting, since its gradient reaches no other layer.
        weights = {
            name: getattr(config, f"{name}_weight") for name in terms if name != "mask_score"
        }
        return {
            name: weights.get(name, 1.0) * term.total / count
            for (name, term), count in zip(terms.items(), counts, strict=True)
        }


def rpn_losses(
    levels: list[LevelOutput], targets: list[Target], config: ModelConfig, generators: Generators
) -> tuple[Term, Term]:
    """Returns the RPN's losses: binary cross-entropy of sampled anchors, and smooth-L1 of deltas.

    Smooth-L1 (β = 1/9) takes the deltas of positive anchors. As in Faster R-CNN, the items of both are
    the sampled anchors.
    """
    logits = torch.cat([level.logits for level in levels], dim=1)
    deltas = torch.cat([level.deltas for level in levels], dim=1)
    anchors = torch.cat([level.anchors for level in levels])
    wanted_logits, wanted, sampled_deltas, wanted_deltas = [], [], [], []
    for i, (target, generator) in enumerate(zip(targets, generators, strict=True)):
        matches = match(
            box_iou(target.boxes, anchors),
            config.rpn_positive_iou,
            config.rpn_negative_iou,
            keep_best=True,
        )
        matches = without_crowds(matches, anchors, target.crowds)
        positive, negative = sample(
            matches, config.rpn_samples, config.rpn_positive_fraction, generator
        )
        wanted_logits.append(logits[i, torch.cat((positive, negative))])
        wanted += [logits.new_ones(len(positive)), logits.new_zeros(len(negative))]
        sampled_deltas.append(deltas[i, positive])
        wanted_deltas.append(encode_boxes(target.boxes[matches[positive]], anchors[positive]))
    chosen = torch.cat(wanted_logits)
    objectness = F.binary_cross_entropy_with_logits(chosen, torch.cat(wanted), reduction="sum")
    box = F.smooth_l1_loss(
        torch.cat(sampled_deltas), torch.cat(wanted_deltas), beta=1 / 9, reduction="sum"
    )
    count = logits.new_tensor(float(len(chosen)))
    return Term(objectness, count), Term(box, count)


def assign_rois(
    proposals: Tensor, target: Target, config: ModelConfig, generator: torch.Generator | None = None
) -> Rois:
    """Returns the RoIs of one image that train both branches, sampled from proposals and objects."""
    candidates = torch.cat((proposals, target.boxes))
    iou = box_iou(target.boxes, candidates)
    matches = match(iou, config.roi_positive_iou, config.roi_positive_iou, keep_best=False)
    matches = without_crowds(matches, candidates, target.crowds)
    positive, negative = sample(
        matches, config.roi_samples, config.roi_positive_fraction, generator
    )
    return Rois(candidates[positive], matches[positive], candidates[negative])


def classification_losses(
    model: CoMask, pyramid: list[Tensor], rois: list[Rois], targets: list[Target]
) -> tuple[Term, Term | None]:
    """Returns cross-entropy over K classes and background, and with `fc_reg` the box regression's loss.

    The regression is Fast R-CNN's: smooth-L1 of positive RoIs (β = 1/9, class-agnostic). The items of
    both are all sampled RoIs.
    """
    boxes, classes, wanted = [], [], []
    for (positive, objects, negative), target in zip(rois, targets, strict=True):
        boxes.append(torch.cat((positive, negative)))
        background = target.labels.new_zeros(len(negative))
        classes.append(torch.cat((target.labels[objects] + 1, background)))
        wanted.append(encode_boxes(target.boxes[objects], positive))
    pooled = pool_by_image(model, pyramid, boxes, CLASSIFIER_POOL)
    logits, deltas = model.classifier(pooled)
    truth = torch.cat(classes)
    count = logits.new_tensor(float(len(truth)), dtype=torch.float32)
    loss = F.cross_entropy(logits.float(), truth, reduction="sum")
    if deltas is None:
        return Term(loss, count), None
    scale = deltas.new_tensor(DELTA_SCALE)
    regression = F.smooth_l1_loss(
        deltas[truth > 0] / scale, torch.cat(wanted) / scale, beta=1 / 9, reduction="sum"
    )
    return Term(loss, count), Term(regression, count)


def head_losses(
    model: CoMask,
    pyramid: list[Tensor],
    image_sizes: Tensor,
    rois: list[Rois],
    targets: list[Target],
    generators: list[torch.Generator],
) -> dict[str, Term]:
    """Returns the losses of the head on jittered positive RoIs, at most `head_rois` per image.

    Returns:
        `mask`, `box` and, with mask scoring, `mask_score`. The mask loss is the binary cross-entropy of
        the mask of the object's class, averaged over 28·28 pixels, and over both passes if the second
        one is trained; its items are the RoIs. The box loss is that of `dense_box_loss`. The mask
        score's loss is the binary cross-entropy with the IoU of the last pass's mask.
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

    found = model.head(pool_by_image(model, pyramid, boxes, POOL_SIZE), label)
    mask_logits = found.masks
    mask_loss = _mask_loss(mask_logits, mask_target)

    flat = torch.cat(boxes)
    cell_boxes = decode_cells(found.offsets, flat)
    weights = _training_weights(model, mask_logits, mask_target)
    last, last_boxes, last_target = found, boxes, mask_target
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
        fine = fine_head(pool_by_image(model, pyramid, refined, POOL_SIZE), label)
        last, last_boxes, last_target = fine, refined, fine_target
        fine_loss = _mask_loss(fine.masks, fine_target)
        mask_loss = (mask_loss + fine_loss) / 2  # A sum would double the mask's weight.
    count = mask_loss.new_tensor(float(len(label)))
    box_loss = dense_box_loss(cell_boxes, torch.cat(objects), weights, config.box_loss)
    terms = {"mask": Term(mask_loss, count), "box": box_loss}
    if model.mask_scorer:
        # The branch reads features and masks and does not change them, so all else stays as without it.
        logits = model.mask_scorer(last.features.detach(), last.masks.detach())
        bits = (torch.sigmoid(last.masks.detach()) >= config.mask_threshold).float()
        counts = [len(b) for b in last_boxes]
        ious = map(
            mask_iou, bits.split(counts), last_target.split(counts), targets, last_boxes, chosen
        )
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat([*ious]), reduction="sum")
        terms["mask_score"] = Term(loss, count)
    return terms


def _mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / MASK_SIZE**2


def _training_weights(model: CoMask, mask_logits: Tensor, mask_target: Tensor) -> Tensor:
    """Returns the weight of each cell's box loss, [R, 7, 7]: from the object's or the predicted mask.

    If all cells vote with equal weight, all are trained with equal weight.
    """
    kind = model.config.cell_targets
    if kind == "pred" or model.config.collaboration == "uniform":
        return model.weigh_cells(mask_logits.detach())
    pooled = F.avg_pool2d(mask_target[:, None], MASK_SIZE // CELLS)[:, 0]
    return pooled if kind == "soft" else (pooled > 0.5).float()


def dense_box_loss(
    cell_boxes: Tensor, truth: Tensor, weights: Tensor, kind: Literal["iou", "giou"] = "iou"
) -> Term:
    """Returns Σ w·(-log IoU) over the cells of all RoIs, and Σ w as items (UnitBox, with D2Det's floor).

    0.1 is added to an IoU of at most 0.1, which bounds the loss and keeps its gradient. With `giou`, the
    loss of a cell is 1 - GIoU.

    Args:
        cell_boxes: [R, 7, 7, 4].
        truth: [R, 4], the box of each RoI's object.
        weights: [R, 7, 7] ≥ 0. The original code loses them in a broadcast; here they take effect.
        kind: the loss of a cell.
    """
    goal = truth[:, None, None].expand_as(cell_boxes)
    if kind == "giou":
        loss = 1 - paired_giou(cell_boxes, goal)
    else:
        iou = paired_iou(cell_boxes, goal)
        loss = -torch.log(torch.where(iou <= 0.1, iou + 0.1, iou))
    return Term((loss * weights).sum(), weights.sum())
