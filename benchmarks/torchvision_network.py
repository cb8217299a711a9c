"""Torchvision's Mask R-CNN as `vs_peers.py` runs it: from a canvas to masks of 28×28, and as ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import Bottleneck

VERSIONS = {"v1": maskrcnn_resnet50_fpn, "v2": maskrcnn_resnet50_fpn_v2}
CLASSES = 80  # COCO's
OUTPUTS = ("boxes", "scores", "masks", "proposals")


class Network(nn.Module):
    """Mask R-CNN without resizing and pasting, which are measured apart; the threshold is an input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, canvas: Tensor, threshold: Tensor) -> dict[str, Tensor]:
        """u8 [H, W, 3] and f32 [] → `OUTPUTS`: of N detections and of P proposals, [P, 4]."""
        model = self.model
        images = model.transform.normalize(canvas.permute(2, 0, 1).float() / 255)[None]
        size = (images.shape[2], images.shape[3])
        features = model.backbone(images)
        proposals, _ = model.rpn(ImageList(images, [size]), features)
        model.roi_heads.score_thresh = threshold
        (found,), _ = model.roi_heads(features, proposals, [size])
        values = (found["boxes"], found["scores"], found["masks"][:, 0], proposals[0])
        return dict(zip(OUTPUTS, values, strict=True))


def torchvision_network(version: str, proposals: int, detections: int) -> Network:
    """`v1` or `v2` with ResNet-50, FPN and random weights of one seed, in evaluation mode."""
    torch.manual_seed(0)
    model = VERSIONS[version](
        weights=None, weights_backbone=None, num_classes=CLASSES + 1,
        rpn_post_nms_top_n_test=proposals, box_detections_per_img=detections,
    )  # fmt: skip
    for block in model.modules():
        if isinstance(
            block, Bottleneck
        ):  # as in CoMask: else 16 untrained blocks blow the signal up
            nn.init.zeros_(block.bn3.weight)
    return Network(model).eval()


def export_network(network: Network, canvas: Tensor, threshold: float, path: Path) -> None:
    """Writes an ONNX file for canvases of any size.

    By the older exporter, which traces: `torch.export` stops at torchvision's `batched_nms`, which takes
    another way where there are many boxes (`GuardOnDataDependentSymNode`).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing; the file's results are compared afterwards
        torch.onnx.export(
            network,
            (canvas, torch.tensor(threshold)),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["canvas", "threshold"],
            output_names=list(OUTPUTS),
            dynamic_axes={"canvas": {0: "height", 1: "width"}}
            | {name: {0: "proposals" if name == "proposals" else "found"} for name in OUTPUTS},
        )
