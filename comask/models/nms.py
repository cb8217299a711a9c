"""Defines `SortedNms`, a custom op of the exported graphs: exact greedy NMS with a fixed-size result.

TensorRT's own NMS has data-dependent shapes, and TensorRT-RTX has no NMS. A keep mask over sorted boxes
solves both problems. The kernels are in `comask/kernels/sorted_nms.cu`; `comask.export.functions` defines
the same op as an ONNX function.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from comask.kernels.launch import (
    MAX_BOXES,
    NMS,
    TILE,
    float32_below,
    nms_keep_launch,
    nms_launch,
    nms_overlaps_launch,
)
from comask.kernels.run import available, on_tensors

VECTOR_BYTES = 16  # the alignment of boxes, which the kernel reads as one vector each


def sorted_nms(boxes: Tensor, group_ids: Tensor, iou_threshold: float) -> Tensor:
    """Returns which boxes greedy non-maximum suppression keeps.

    Args:
        boxes: [G, M, 4] f32 `xyxy`, each row of M boxes by falling score.
        group_ids: [G, M] integers within i32; only boxes with equal ids compete.
        iou_threshold: a box is dropped when its IoU with a kept one exceeds this.

    Returns:
        [G, M] bool.
    """
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "comask::SortedNms",
            (boxes, group_ids),
            attrs={
                "iou_threshold": float32_below(iou_threshold),
                "plugin_namespace": "comask",
                "plugin_version": "1",
            },
            dtype=torch.bool,
            shape=group_ids.shape,
            version=1,
        )
    keep: Tensor = _sorted_nms(boxes, group_ids, iou_threshold)
    return keep


@torch.library.custom_op("comask::sorted_nms", mutates_args=())
def _sorted_nms(boxes: Tensor, group_ids: Tensor, iou_threshold: float) -> Tensor:
    """Runs the kernel on tensors, or torchvision's operator where the kernel cannot be compiled.

    Raises:
        ValueError: when the shapes do not fit together, or the tensors are on different devices.
    """
    if boxes.shape != (*group_ids.shape, 4) or boxes.device != group_ids.device:
        raise ValueError(
            f"sorted_nms got boxes {tuple(boxes.shape)} on {boxes.device} and group_ids "
            f"{tuple(group_ids.shape)} on {group_ids.device}; expected [G, M, 4] and [G, M] on one device"
        )
    if not available(NMS, boxes.device):
        return _by_torchvision(boxes, group_ids, iou_threshold)
    keep = torch.empty(group_ids.shape, dtype=torch.bool, device=boxes.device)
    ids = group_ids.to(torch.int32).contiguous()
    rows, count = ids.shape
    boxes = boxes.float().contiguous()
    if boxes.data_ptr() % VECTOR_BYTES:
        boxes = boxes.clone()
    if boxes.is_cuda and count <= MAX_BOXES:
        _run_halves(boxes, ids, iou_threshold, keep)
    else:
        on_tensors(nms_launch(rows, count, iou_threshold), [boxes, ids], keep)
    return keep


def _run_halves(boxes: Tensor, ids: Tensor, iou_threshold: float, keep: Tensor) -> None:
    """Runs NMS in the two launches that use all of a GPU, but take more work in all than one launch."""
    rows, count = ids.shape
    words = torch.empty((rows, -(-count // TILE), count), dtype=torch.int32, device=ids.device)
    on_tensors(nms_overlaps_launch(rows, count, iou_threshold), [boxes, ids], words)
    on_tensors(nms_keep_launch(rows, count), [words], keep)


@_sorted_nms.register_fake
def _fake(boxes: Tensor, group_ids: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty(group_ids.shape, dtype=torch.bool, device=boxes.device)


def _by_torchvision(boxes: Tensor, group_ids: Tensor, iou_threshold: float) -> Tensor:
    rank = torch.arange(boxes.shape[1], 0, -1, dtype=torch.float32, device=boxes.device)
    keep = torch.zeros_like(group_ids, dtype=torch.bool)
    for row_boxes, row_ids, row_keep in zip(boxes, group_ids, keep, strict=True):
        for group in row_ids.unique().tolist():
            members = torch.where(row_ids == group)[0]
            kept = torchvision.ops.nms(row_boxes[members], rank[members], iou_threshold)
            row_keep[members[kept]] = True
    return keep


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest scores along the last axis; ties go to the lower index in every backend.

    ONNX's TopK guarantees that; PyTorch's `topk` does not, so a stable sort replaces it.

    Returns:
        Values and indices, [..., k] each.
    """
    if torch.onnx.is_in_onnx_export():
        return torch.topk(scores, k)
    values, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :k], order[..., :k]
