"""Leaves out the rows of the collaborative head that hold no detection.

A graph returns D rows per image, whatever was found. `CutRows` and `PadRows`, two of our ops, let the
head compute only as many rows as the batch's fullest image has. TensorRT needs fixed shapes: there, both
ops are the identity (`comask.export.functions`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class FoundRows:
    """Cuts [B, D, …] to the rows that were found in some image of the batch, and pads it again.

    Args:
        found: [B] i32, the number of detections of each image.
        detections: D, the number of rows of a graph's outputs.
        rows: [1, n], a tensor whose shape stands for that of rows while the exporter traces the network,
            since their number is not known then; else None.
    """

    def __init__(self, found: Tensor, detections: int, rows: Tensor | None) -> None:
        self._found, self._detections = found, detections
        if rows is not None:
            self._count = rows.shape[1]
        else:
            self._count = max(1, int(found.max()))  # one row at least, since some operators need it

    def cut(self, values: Tensor) -> Tensor:
        """Returns the first rows of [B, D, …]."""
        if not torch.onnx.is_in_onnx_export():
            return values[:, : self._count]
        shape = [values.shape[0], self._count, *values.shape[2:]]
        return _op("CutRows", (values, self._found), values.dtype, shape)

    def pad(self, values: Tensor) -> Tensor:
        """Returns [B, n, …] as [B, D, …], with zeros in the rows that were cut off."""
        missing = self._detections - self._count
        if not torch.onnx.is_in_onnx_export():
            return F.pad(values, (0, 0) * (values.ndim - 2) + (0, missing))
        shape = [values.shape[0], self._detections, *values.shape[2:]]
        return _op("PadRows", (values,), values.dtype, shape, detections=self._detections)


def zeros_unless(valid: Tensor, values: Tensor) -> Tensor:
    """Returns [B, n, …] with zeros in the rows that are not valid, [B, n] bool."""
    return torch.where(valid.reshape(*valid.shape, *(1,) * (values.ndim - 2)), values, 0.0)


def _op(
    name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: list[int], **attributes: Any
) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"comask::{name}", inputs, attrs=attributes, dtype=dtype, shape=shape, version=1
    )
