"""The network CoMask (Fig. 1 of the paper): two stages that training, inference and export share.

Legend: B batch, H and W the padded canvas in pixels (multiples of 32), C channels, N proposals and
D detections per image. Boxes are f32 `xyxy` in pixels of the resized image.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from comask.config import ModelConfig, PreprocessConfig
from comask.errors import CheckpointError
from comask.models.backbone import build_backbone
from comask.models.box_refinement import POOL_SIZE as HEAD_POOL
from comask.models.box_refinement import (
    CollaborativeHead,
    HeadOutputs,
    average_box,
    cell_confidence,
    cell_weights,
    decode_cells,
)
from comask.models.boxes import clip_boxes, decode_boxes, paired_iou
from comask.models.classifier import POOL_SIZE as CLASSIFIER_POOL
from comask.models.classifier import Classifier, choose_detections, scores_are_numbers
from comask.models.found_rows import FoundRows, zeros_unless
from comask.models.mask_scoring import MaskScorer
from comask.models.neck import MFPN, MSFEM
from comask.models.nms import sorted_nms, top_k
from comask.models.precision import FloatTensors
from comask.models.roi_align import pyramid_roi_align
from comask.models.rpn import RPN, proposals_from_levels

STAGE1_INPUTS = ("images", "image_sizes")
STAGE1_OUTPUTS = ("p2", "p3", "p4", "p5", "proposals", "proposal_scores")
STAGE2_INPUTS = (*STAGE1_OUTPUTS, "image_sizes")
STAGE2_OUTPUTS = ("num_detections", "boxes", "scores", "labels", "masks")
DIAGNOSTIC_OUTPUTS = ("first_boxes", "coarse_masks", "cell_weights", "plain_boxes")


def stage2_outputs(config: ModelConfig, *, diagnostics: bool = False) -> tuple[str, ...]:
    """Returns the names of stage 2's outputs, in the graph's order; `CoMask.stage2` explains them."""
    optional = {
        "mask_boxes": config.second_boxes,
        "class_scores": config.agreement_score or config.mask_scoring,
    }
    names = STAGE2_OUTPUTS + tuple(name for name, there in optional.items() if there)
    return names + (DIAGNOSTIC_OUTPUTS if diagnostics else ())


class CoMask(FloatTensors):
    """Backbone, MFPN, RPN, classification branch, collaborative head and, as an option, mask scoring.

    Args:
        config: the network's settings.
        preprocess: the settings whose mean and standard deviation normalise the images.

    Attributes:
        dtype: the type of the feature maps; f16 after `half()`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, preprocess: PreprocessConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.register_buffer("mean", torch.tensor(preprocess.mean), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std), persistent=False)
        self.backbone = build_backbone(config)
        self.mfpn = MFPN(self.backbone.out_channels, config)
        self.rpn = RPN(config.channels, config.anchor_sizes, config.anchor_ratios)
        self.classifier = Classifier(config)
        self.head = CollaborativeHead(config, regress=config.collaboration != "fc_reg")
        separate = config.separate_fine_head
        self.fine_head = CollaborativeHead(config, regress=False) if separate else None
        # Last, so that the branch changes no other layer's random start.
        self.mask_scorer = MaskScorer(config) if config.mask_scoring else None

    @override
    def half(self) -> Self:
        self.dtype = torch.float16
        return super().half()

    def pyramid(self, images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        """Maps images u8 [B, H, W, 3] and sizes i32 [B, 2] to P2..P6, each [B, C, H/2^i, W/2^i].

        Images are RGB, sizes are (h, w). Pixels outside an image's size are set to zero after
        normalisation.
        """
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        height, width = images.shape[1:3]
        rows = torch.arange(height, device=images.device)[None] < image_sizes[:, :1]
        columns = torch.arange(width, device=images.device)[None] < image_sizes[:, 1:]
        inside = rows[:, :, None] & columns[:, None, :]
        x = torch.where(inside[..., None], x, 0.0).permute(0, 3, 1, 2)
        features = self.backbone(x.to(self.dtype))
        if self.backbone.recompute and self.training:
            pyramid: list[Tensor] = checkpoint(self.mfpn, features, use_reentrant=False)
        else:
            pyramid = self.mfpn(features)
        return pyramid

    def pool(self, pyramid: list[Tensor], rois: Tensor, size: int) -> Tensor:
        """Pools RoIs [B, N, 4] to features [B·N, C, size, size]."""
        return pyramid_roi_align(
            pyramid,
            rois,
            size,
            sampling_ratio=self.config.roi_sampling_ratio,
            canonical_size=self.config.roi_canonical_size,
        )

    def stage1(self, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        """Runs backbone, MFPN and RPN.

        Args:
            images: u8 [B, H, W, 3], RGB on a padded canvas.
            image_sizes: i32 [B, 2], (h, w) of each image on its canvas.

        Returns:
            `p2`…`p5` [B, C, H/4…H/32, W/4…W/32], `proposals` [B, N, 4] and `proposal_scores` [B, N]
            by falling score; a score of 0 marks padding.
        """
        pyramid = self.pyramid(images, image_sizes)
        proposals, scores = proposals_from_levels(
            self.rpn(pyramid),
            image_sizes,
            candidates_per_level=self.config.rpn_top_k,
            num_proposals=self.config.proposals,
            nms_iou=self.config.rpn_nms_iou,
        )
        return dict(zip(STAGE1_OUTPUTS, (*pyramid[:4], proposals, scores), strict=True))

    def stage2(
        self,
        p2: Tensor,
        p3: Tensor,
        p4: Tensor,
        p5: Tensor,
        proposals: Tensor,
        proposal_scores: Tensor,
        image_sizes: Tensor,
        *,
        diagnostics: bool = False,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Classifies proposals, selects the best D by threshold and NMS, and refines them (section 3.2).

        Args:
            p2, p3, p4, p5, proposals, proposal_scores: the results of `stage1`; fewer proposals may be
                passed, namely the first n.
            image_sizes: i32 [B, 2], (h, w).
            diagnostics: also return tensors that show the effect of the second pass and of the cells'
                weights.
            rows: see `FoundRows`; only the exporter passes it.

        Returns:
            `num_detections` i32 [B], `boxes` f32 [B, D, 4], `scores` f32 [B, D], `labels` i32
            [B, D] from 0, `masks` f32 [B, D, 28, 28] in 0..1; rows are in order of falling score, and
            rows from `num_detections` on are zeros. `num_detections` is -1 where scores are not finite.
            With `second_boxes`, `boxes` are the second pass's, and `mask_boxes` f32 [B, D, 4] are the
            boxes over which the masks lie. With `agreement_score` or `mask_scoring`, `class_scores` f32
            [B, D] are the classifier's probabilities, and `scores` are their products with the factors.
            With `diagnostics`, also: `first_boxes` [B, D, 4], the unrefined proposals; `coarse_masks`
            [B, D, 28, 28] over these boxes; `cell_weights` [B, D, 7, 7]; and `plain_boxes` [B, D, 4],
            the boxes that result from equal weights of all cells.
        """
        config, pyramid = self.config, [p2, p3, p4, p5]
        per_image = proposals.shape[:2]
        class_logits, deltas = self.classifier(self.pool(pyramid, proposals, CLASSIFIER_POOL))
        class_logits = class_logits.reshape(*per_image, config.num_classes + 1)
        chosen = choose_detections(
            class_logits,
            proposals,
            proposal_scores,
            score_threshold=config.score_threshold,
            nms_iou=config.nms_iou,
            num_detections=config.detections,
        )
        # Most images have few objects, so that most of the D rows are padding, which needs no head.
        found = FoundRows(chosen.found, config.detections, rows)
        rois, labels = found.cut(chosen.boxes), found.cut(chosen.labels).flatten()
        if deltas is None:
            refined, coarse, weights, cells = self.refine(pyramid, rois, labels)
        else:
            places = found.cut(chosen.rows)[..., None].expand(-1, -1, 4)
            refined = decode_boxes(deltas.reshape(*per_image, 4).gather(1, places), rois)
            if diagnostics:
                _, coarse, weights, cells = self.refine(pyramid, rois, labels)
        boxes = clip_boxes(refined, image_sizes)
        second = (self.fine_head or self.head)(self.pool(pyramid, boxes, HEAD_POOL), labels)

        by_row = {
            "boxes": boxes,
            "masks": torch.sigmoid(second.masks).unflatten(0, boxes.shape[:2]),
        }
        scores = found.cut(chosen.scores)
        by_row |= self.judged(second, boxes, image_sizes, scores)
        if diagnostics:
            by_row["coarse_masks"] = torch.sigmoid(coarse).unflatten(0, boxes.shape[:2])
            by_row["cell_weights"] = weights.unflatten(0, boxes.shape[:2])
            plain = cells.mean(dim=(1, 2)).unflatten(0, boxes.shape[:2])
            by_row["plain_boxes"] = clip_boxes(plain, image_sizes)
        outputs = {
            "first_boxes": chosen.boxes,
            "scores": chosen.scores,
            "class_scores": chosen.scores,
            "labels": chosen.labels.to(torch.int32),
        } | {name: found.pad(zeros_unless(scores > 0, values)) for name, values in by_row.items()}
        names = stage2_outputs(config, diagnostics=diagnostics)
        outputs = {name: outputs[name] for name in names[1:]}
        if "class_scores" in names:
            outputs = keep_rows(outputs, outputs["scores"] > 0)
        if config.refined_nms_iou:
            outputs = drop_duplicates(outputs, config.refined_nms_iou)
        count = (outputs["scores"] > 0).sum(1, dtype=torch.int32)
        count = torch.where(scores_are_numbers(class_logits, proposal_scores), count, -1)
        return {"num_detections": count, **outputs}

    def refine(
        self, pyramid: list[Tensor], rois: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs the head's first pass: the coarse mask weighs the dense boxes, which are averaged.

        Args:
            pyramid: P2..P5.
            rois: [B, D, 4].
            labels: [B·D] i64 from 0.

        Returns:
            Boxes [B, D, 4], not clipped; coarse mask logits [B·D, 28, 28]; cell weights [B·D, 7, 7];
            the cells' boxes [B·D, 7, 7, 4].
        """
        first = self.head(self.pool(pyramid, rois, HEAD_POOL), labels)
        averaged, weights, cell_boxes = self.averaged_boxes(first, rois)
        return averaged, first.masks, weights, cell_boxes

    def averaged_boxes(self, found: HeadOutputs, rois: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns boxes [B, D, 4], not clipped, cell weights and cells' boxes of RoIs [B, D, 4]."""
        flat = rois.reshape(-1, 4)
        cell_boxes = decode_cells(found.offsets, flat)
        weights = self.weigh_cells(found.masks)
        return average_box(cell_boxes, weights, flat).reshape(rois.shape), weights, cell_boxes

    def judged(
        self, second: HeadOutputs, boxes: Tensor, image_sizes: Tensor, scores: Tensor
    ) -> dict[str, Tensor]:
        """Returns what the options beyond the paper change in stage 2's outputs.

        If the second pass moves a refined box far, the first one was not sure of the place.

        Args:
            second: the second pass's outputs.
            boxes: [B, D, 4], the refined boxes.
            image_sizes: i32 [B, 2], (h, w).
            scores: [B, D], the class scores.
        """
        config = self.config
        changed: dict[str, Tensor] = {}
        if config.agreement_score or config.second_boxes:
            again = clip_boxes(self.averaged_boxes(second, boxes)[0], image_sizes)
            if config.second_boxes:
                changed |= {"boxes": again, "mask_boxes": boxes}
            if config.agreement_score:
                changed["scores"] = scores = scores * paired_iou(boxes, again)
        if self.mask_scorer:
            logits = self.mask_scorer(second.features, second.masks)
            changed["scores"] = scores * torch.sigmoid(logits).reshape(scores.shape)
        return changed

    def weigh_cells(self, coarse: Tensor) -> Tensor:
        """Returns the weights of the cells' boxes, [R, 7, 7] in 0..1, from mask logits [R, 28, 28]."""
        config = self.config
        confidence = cell_confidence(coarse, config.cell_pooling)
        if config.collaboration == "uniform":
            return torch.ones_like(confidence)
        return cell_weights(confidence, config.cell_threshold, config.empty_foreground)


def drop_duplicates(outputs: dict[str, Tensor], iou: float) -> dict[str, Tensor]:
    """Applies NMS per class to the outputs' boxes; kept rows move up, dropped rows become padding.

    Args:
        outputs: `boxes`, `scores`, `labels`, `masks` and further tensors of shape [B, D, …], by falling
            score.
        iou: overlap above which the box of the lower score is dropped.
    """
    keep = sorted_nms(outputs["boxes"], outputs["labels"], iou) & (outputs["scores"] > 0)
    return keep_rows(outputs, keep)


def keep_rows(outputs: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """Returns outputs [B, D, …] by falling score; rows not in `keep`, [B, D] bool, become padding."""
    _, order = top_k(torch.where(keep, outputs["scores"], 0.0), keep.shape[1])
    keep = keep.gather(1, order)
    moved = {}
    for name, value in outputs.items():
        tail = (1,) * (value.ndim - 2)
        place = order.reshape(*order.shape, *tail).expand(-1, -1, *value.shape[2:])
        kept = keep.reshape(*keep.shape, *tail)
        zero = torch.zeros((), dtype=value.dtype, device=value.device)
        moved[name] = torch.where(kept, value.gather(1, place), zero)
    return moved


def load_weights(model: CoMask, weights: dict[str, Tensor]) -> None:
    """Copies a complete state dict into `model`.

    Raises:
        CheckpointError: with the first weights that are missing, superfluous or of another shape.
    """
    try:
        model.load_state_dict(weights)
    # Values that are not tensors raise TypeError or AttributeError.
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the weights do not fit the model's configuration: {reason}"
        ) from error


def folded(model: CoMask) -> CoMask:
    """Returns a copy in the form of the exported graphs, whose layers have one weight each.

    Each BatchNorm is folded into its convolution, and the MFPN's reductions are split by scale. `model`
    is in evaluation mode.
    """
    copy = deepcopy(model)
    copy.backbone.fold()
    for module in copy.mfpn.modules():
        if isinstance(module, MSFEM):
            module.split_reduce()
    return copy
