"""Classification branch: two fully connected layers on 7×7 RoI features, and the choice of detections.

It regresses no boxes; that is the collaborative head's task (section 3.2), but for the ablation
`fc_reg`.

Legend: B batch, N proposals an image, K classes, M candidates, D detections an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comask.config import CANDIDATES, ModelConfig
from comask.models.nms import sorted_nms, top_k

POOL_SIZE = 7

# A regressed delta times this is one of `comask.models.boxes.decode_boxes` (Fast R-CNN's scale).
DELTA_SCALE = (0.1, 0.1, 0.2, 0.2)


class Classifier(nn.Module):
    """FC, ReLU, FC, ReLU, FC.

    Args:
        config: of the network; with `fc_reg` it also regresses one box a RoI, for all classes.
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
        """RoI features [R, C, 7, 7] → logits [R, K + 1], background first, and deltas [R, 4]."""
        hidden = F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(1)))))
        if self.deltas is None:
            return self.logits(hidden), None
        scale = pooled.new_tensor(DELTA_SCALE, dtype=torch.float32)
        return self.logits(hidden), self.deltas(hidden).float() * scale


class Chosen(NamedTuple):
    """The proposals that become detections, by falling score; rows from `found` on are padding.

    Attributes:
        found: [B] i32, how many there are.
        boxes: [B, D, 4] f32, the unrefined proposals; zeros in padding.
        scores: [B, D] f32 in 0..1; 0 in padding.
        labels: [B, D] i64 from 0; 0 in padding.
        rows: [B, D] i64, each one's place among the proposals; any in padding.
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
    """Score threshold, NMS inside each class, the best D; one proposal may win several classes.

    Args:
        class_logits: [B, N, K + 1].
        proposals: [B, N, 4] f32 `xyxy` in pixels.
        proposal_scores: [B, N]; 0 marks padding.
        score_threshold: a (proposal, class) pair must score above this.
        nms_iou: overlap above which the lower of two boxes of one class goes.
        num_detections: D.
    """
    probabilities = torch.softmax(class_logits.float(), dim=-1)[..., 1:]
    num_classes = probabilities.shape[-1]
    sound = (probabilities > score_threshold) & (proposal_scores > 0)[..., None]
    pairs = torch.where(sound, probabilities, 0.0).flatten(1)
    # CANDIDATES more entries than there are pairs, so that few proposals need no smaller TopK
    none = pairs.new_zeros((pairs.shape[0], CANDIDATES))
    scores, order = top_k(torch.cat((pairs, none), dim=1), CANDIDATES)
    order = order.clamp(max=pairs.shape[1] - 1)
    labels = order % num_classes
    rows = order // num_classes
    boxes = proposals.gather(1, rows[..., None].expand(-1, -1, 4))

    keep = sorted_nms(boxes, labels.to(torch.int32), nms_iou) & (scores > 0)
    scores, order = top_k(torch.where(keep, scores, 0.0), num_detections)
    found = scores > 0
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return Chosen(
        found=found.sum(1, dtype=torch.int32),
        boxes=torch.where(found[..., None], boxes, 0.0),
        scores=scores,
        labels=torch.where(found, labels.gather(1, order), 0),
        rows=rows.gather(1, order),
    )


def scores_are_numbers(class_logits: Tensor, proposal_scores: Tensor) -> Tensor:
    """Whether an image's scores say anything.

    A NaN lies above no threshold, so that without this a network that overflowed looks like one that
    found nothing.

    Args:
        class_logits: [B, N, K + 1].
        proposal_scores: [B, N].

    Returns:
        [B] bool.
    """
    largest = torch.finfo(torch.float32).max
    numbers = (class_logits.float().abs() <= largest).all(-1) & (proposal_scores >= 0)
    return numbers.all(-1)
