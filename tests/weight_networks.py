"""Networks that weights are imported into, and names of weights: what two test files share."""

from __future__ import annotations

import re
from typing import Any

import torch
from strategies import tiny_config
from torch import Tensor, nn

from comask.config import PreprocessConfig
from comask.data.source import Category
from comask.models.comask import CoMask

State = dict[str, Tensor]
BACKBONE18 = 100  # 20 convolutions, 20 × 4 of BatchNorm


def classes(*names: str) -> tuple[Category, ...]:
    return tuple(Category(id=10 * i, name=name) for i, name in enumerate(names, 1))


TWO = classes("cat", "dog")


def network(seed: int = 5, **changes: Any) -> CoMask:
    """One for TWO classes, small where torchvision's widths do not matter."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "num_classes": 2,
        "backbone": "resnet18",
        "backbone_norm": "frozen",
        "msfem_branches": 1,
    }
    return CoMask(tiny_config(**(settings | changes)), PreprocessConfig()).eval()


def scramble(net: nn.Module) -> None:
    """Values that differ everywhere, also where networks are initialised with constants."""
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.ndim == 1 and value.is_floating_point():
            value += torch.randn_like(value) * 0.1


def old_torchvision(state: State) -> State:
    """The names before torchvision 0.13."""
    return {
        re.sub(
            r"(_blocks\.\d)\.0\.", r"\1.", name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        ): v
        for name, v in state.items()
    }


def mmdetection(state: State, box_head: str = "roi_head.bbox_head") -> State:
    """The names of mmdetection 2 and 3; the first has `bbox_head` at the top."""
    pairs = (
        ("backbone.body.", "backbone."),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
        (r"rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
        (r"rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
        (r"roi_heads\.box_head\.fc6\.", f"{box_head}.shared_fcs.0."),
        (r"roi_heads\.box_head\.fc7\.", f"{box_head}.shared_fcs.1."),
        (r"roi_heads\.box_predictor\.cls_score\.", f"{box_head}.fc_cls."),
        (r"roi_heads\.mask_head\.", "roi_head.mask_head."),
    )
    renamed = {}
    for name, value in state.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    return renamed
