"""Torchvision's Mask R-CNN from a canvas to masks of 28×28, and its ONNX export, for `vs_peers.py`."""

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
    """Mask R-CNN without resizing and pasting, which are timed separately; the threshold is an input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, canvas: Tensor, threshold: Tensor) -> dict[str, Tensor]:
        """Maps a canvas u8 [H, W, 3] and a threshold f32 [] to `OUTPUTS`."""
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
    """Returns `v1` or `v2` with ResNet-50, FPN and seeded random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = VERSIONS[version](
        weights=None, weights_backbone=None, num_classes=CLASSES + 1,
        rpn_post_nms_top_n_test=proposals, box_detections_per_img=detections,
    )  # fmt: skip
    for block in model.modules():
        # As in CoMask: without this, 16 untrained blocks amplify the signal far too much.
        if isinstance(block, Bottleneck):
            nn.init.zeros_(block.bn3.weight)
    return Network(model).eval()


def export_network(network: Network, canvas: Tensor, threshold: float, path: Path) -> None:
    """Writes an ONNX file for canvases of any size.

    It uses the older exporter, which traces. `torch.export` stops at torchvision's `batched_nms`, which
    uses another algorithm for many boxes (`GuardOnDataDependentSymNode`).
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # tracing warns; `vs_peers.py` compares the file's results afterwards
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
