"""The losses of CoMask: RPN and classification, with those of the head from `head_losses`.

Each loss is a sum over items of the batch (anchors, RoIs, cells) over how many there are, counted on
all processes together, so that several processes do what one does with all of their images. Each is
a finite number with a gradient for all of its parameters, also for a batch without a single object,
so that no process waits for another.

Legend: B batch, R positive RoIs of the batch, K classes. Boxes are f32 `xyxy` in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from comask.config import ModelConfig
from comask.data.target import Target
from comask.models.boxes import encode_boxes
from comask.models.classifier import DELTA_SCALE
from comask.models.classifier import POOL_SIZE as CLASSIFIER_POOL
from comask.models.comask import CoMask
from comask.models.rpn import LevelOutput, proposals_from_levels
from comask.training.distributed import mean_over_ranks
from comask.training.head_losses import head_losses
from comask.training.rois import Rois, Term, pool_by_image
from comask.training.targets import match, sample, without_crowds

Generators = list[torch.Generator]


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
        mask, box = head_losses(model, pyramid, image_sizes, rois, targets, generators)
        terms = {
            "rpn_objectness": objectness,
            "rpn_box": anchor_box,
            "class": classes,
            "mask": mask,
            "box": regressed or box,
        }
        items = torch.stack([term.items for term in terms.values()])
        share = mean_over_ranks(items)  # of this process, were all alike
        counts = torch.where(share > 0, share, 1.0)
        return {
            name: getattr(config, f"{name}_weight") * term.total / count
            for (name, term), count in zip(terms.items(), counts, strict=True)
        }


def rpn_losses(
    levels: list[LevelOutput], targets: list[Target], config: ModelConfig, generators: Generators
) -> tuple[Term, Term]:
    """Binary cross-entropy of sampled anchors, and smooth-L1 (β = 1/9) of the positive ones' deltas.

    Both count the sampled anchors, as in Faster R-CNN.
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
    """The RoIs of one image that train both branches: sampled proposals and the objects themselves."""
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
    """Cross-entropy over K classes and background; with `fc_reg` also smooth-L1 of the positives.

    The regression is Fast R-CNN's (β = 1/9, class-agnostic); both count all sampled RoIs.
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
