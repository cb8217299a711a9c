"""The classification branch, fully connected layers on 7×7 RoI features, and the choice of detections.

The branch regresses boxes in the ablation `fc_reg` only; otherwise, the collaborative head does
(section 3.2).

Legend: B batch, N proposals per image, K classes, M candidates, D detections per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comask.config import CANDIDATES, ModelConfig
from comask.models.nms import sorted_nms, top_k

POOL_SIZE = 7

# The factors from regressed deltas to those of `comask.models.boxes.decode_boxes`, as in Fast R-CNN.
DELTA_SCALE = (0.1, 0.1, 0.2, 0.2)


class Classifier(nn.Module):
    """The layers FC, ReLU, FC, ReLU, FC.

    Args:
        config: the network's settings; with `fc_reg`, the branch also regresses one box per RoI, which
            all classes share.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.classifier_width
        self.fc1 = nn.Linear(config.channels * POOL_SIZE**2, width)
        self.fc2 = nn.Linear(width, width)
        self.logits = nn.Linear(width, config.num_classes + 1)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.zeros_(self.logits.bias)
        self.deltas = nn.Linear(width, 4) if config.collaboration == "fc_reg" else None
        if self.deltas:
            nn.init.normal_(self.deltas.weight, std=0.001)
            nn.init.zeros_(self.deltas.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps RoI features [R, C, 7, 7] to logits [R, K + 1], background first, and deltas [R, 4]."""
        hidden = F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(1)))))
        if self.deltas is None:
            return self.logits(hidden), None
        scale = pooled.new_tensor(DELTA_SCALE, dtype=torch.float32)
        return self.logits(hidden), self.deltas(hidden).float() * scale


class Chosen(NamedTuple):
    """The proposals that become detections, by falling score; rows from `found` on are padding.

    Attributes:
        found: [B] i32, the number of detections.
        boxes: [B, D, 4] f32, the unrefined proposals; zeros in padding.
        scores: [B, D] f32 in 0..1; 0 in padding.
        labels: [B, D] i64 from 0; 0 in padding.
        rows: [B, D] i64, each detection's index among the proposals; arbitrary in padding.
    """

    found: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    rows: Tensor


def choose_detections(
    class_logits: Tensor,
    proposals: Tensor,
    proposal_scores: Tensor,
    *,
    score_threshold: float,
    nms_iou: float,
    num_detections: int,
) -> Chosen:
    """Chooses the best D detections after a score threshold and NMS inside each class.

    One proposal may be chosen for several classes.

    Args:
        class_logits: [B, N, K + 1].
        proposals: [B, N, 4] f32 `xyxy` in pixels.
        proposal_scores: [B, N]; 0 marks padding.
        score_threshold: a (proposal, class) pair must score above this.
        nms_iou: overlap above which the box of the lower score is dropped, if both have one class.
        num_detections: D, the number of detections per image.
    """
    probabilities = torch.softmax(class_logits.float(), dim=-1)[..., 1:]
    num_classes = probabilities.shape[-1]
    sound = (probabilities > score_threshold) & (proposal_scores > 0)[..., None]
    pairs = torch.where(sound, probabilities, 0.0).flatten(1)
    # CANDIDATES entries are appended, so that TopK need not shrink if fewer pairs exist.
    none = pairs.new_zeros((pairs.shape[0], CANDIDATES))
    scores, order = top_k(torch.cat((pairs, none), dim=1), CANDIDATES)
    order = order.clamp(max=pairs.shape[1] - 1)
    labels = order % num_classes
    rows = order // num_classes
    boxes = proposals.gather(1, rows[..., None].expand(-1, -1, 4))

    keep = sorted_nms(boxes, labels.to(torch.int32), nms_iou) & (scores > 0)
    scores, order = top_k(torch.where(keep, scores, 0.0), num_detections)
    valid = scores > 0
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return Chosen(
        found=valid.sum(1, dtype=torch.int32),
        boxes=torch.where(valid[..., None], boxes, 0.0),
        scores=scores,
        labels=torch.where(valid, labels.gather(1, order), 0),
        rows=rows.gather(1, order),
    )


def scores_are_numbers(class_logits: Tensor, proposal_scores: Tensor) -> Tensor:
    """Returns whether all scores of an image are finite.

    A NaN exceeds no threshold. Without this check, a network that overflowed would look like one that
    finds nothing.

    Args:
        class_logits: [B, N, K + 1].
        proposal_scores: [B, N].

    Returns:
        [B] bool.
    """
    largest = torch.finfo(torch.float32).max
    numbers = (class_logits.float().abs() <= largest).all(-1) & (proposal_scores >= 0)
    return numbers.all(-1)
