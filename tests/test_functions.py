"""The custom ops' ONNX bodies against their PyTorch twins."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from comask.export.functions import DOMAIN, OPSET, pyramid_roi_align_function, sorted_nms_function
from comask.models.nms import float32_below, sorted_nms
from comask.models.roi_align import STRIDES, pyramid_roi_align


def session(
    function: onnx.FunctionProto, inputs: dict[str, tuple[int, int]], output: tuple[str, int], rank: int,
    **attributes: object,
) -> onnxruntime.InferenceSession:  # fmt: skip
    """A graph of one custom node; inputs are name → (type, rank)."""
    node = helper.make_node(
        function.name, list(inputs), [output[0]], domain=DOMAIN, plugin_namespace="comask",
        plugin_version="1", **attributes,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one_op",
        [helper.make_tensor_value_info(n, t, [None] * size) for n, (t, size) in inputs.items()],
        [helper.make_tensor_value_info(output[0], output[1], [None] * rank)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def random_boxes(rng: np.random.Generator, rows: int, count: int, spread: float) -> np.ndarray:
    corner = rng.uniform(0, spread, (rows, count, 2))
    return np.concatenate([corner, corner + rng.uniform(0, 60, corner.shape)], 2).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(
    ("rows", "count", "groups"), [(1, 1, 1), (3, 200, 1), (2, 300, 5), (1, 64, 64)]
)
def test_sorted_nms(threshold: float, rows: int, count: int, groups: int) -> None:
    run = session(
        sorted_nms_function(),
        {"boxes": (TensorProto.FLOAT, 3), "group_ids": (TensorProto.INT32, 2)},
        ("keep", TensorProto.BOOL),
        2,
        iou_threshold=float32_below(threshold),
    )
    rng = np.random.default_rng(count)
    for spread in (20.0, 200.0):
        boxes = random_boxes(rng, rows, count, spread)
        boxes[:, ::7, 2:] = boxes[:, ::7, :2]  # without an area
        boxes[:, 1::9] = boxes[:, :1]  # the same again
        ids = rng.integers(0, groups, (rows, count), dtype=np.int32)
        (keep,) = run.run(None, {"boxes": boxes, "group_ids": ids})
        expected = sorted_nms(torch.from_numpy(boxes), torch.from_numpy(ids), threshold).numpy()
        np.testing.assert_array_equal(keep, expected)


def test_sorted_nms_at_an_iou_of_exactly_the_threshold() -> None:
    run = session(
        sorted_nms_function(),
        {"boxes": (TensorProto.FLOAT, 3), "group_ids": (TensorProto.INT32, 2)},
        ("keep", TensorProto.BOOL),
        2,
        iou_threshold=float32_below(0.3),
    )
    # IoU of 3/10, which in f32 is a little more than 0.3 in f64: torchvision suppresses it
    boxes = np.array([[[0, 0, 10, 1], [0, 0, 3, 1]]], np.float32)
    ids = np.zeros((1, 2), np.int32)
    (keep,) = run.run(None, {"boxes": boxes, "group_ids": ids})
    expected = sorted_nms(torch.from_numpy(boxes), torch.from_numpy(ids), 0.3).numpy()
    np.testing.assert_array_equal(keep, expected)


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (1, 40), (3, 25)])
@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("canonical", [56.0, 112.0, 224.0])
def test_pyramid_roi_align(batch: int, count: int, size: int, canonical: float) -> None:
    maps = ["p2", "p3", "p4", "p5"]
    run = session(
        pyramid_roi_align_function(),
        {**dict.fromkeys(maps, (TensorProto.FLOAT, 4)), "rois": (TensorProto.FLOAT, 3)},
        ("pooled", TensorProto.FLOAT),
        4,
        output_size=size, sampling_ratio=2, canonical_size=canonical, canonical_level=4,
        strides=list(STRIDES), aligned=1,
    )  # fmt: skip
    rng = np.random.default_rng(size + count)
    pyramid = [rng.normal(size=(batch, 5, 512 // s, 640 // s)).astype(np.float32) for s in STRIDES]
    corner = rng.uniform(-20, 500, (batch, count, 2))
    side = np.exp(rng.uniform(0, 6.5, (batch, count, 2)))
    rois = np.concatenate([corner, corner + side], 2).astype(np.float32)
    rois[:, ::5, 2:] = rois[:, ::5, :2]  # without an area
    rois[:, :3] = [0, 0, canonical, canonical]  # on a level's edge
    (pooled,) = run.run(None, {**dict(zip(maps, pyramid, strict=True)), "rois": rois})
    expected = pyramid_roi_align(
        [torch.from_numpy(p) for p in pyramid], torch.from_numpy(rois), size,
        sampling_ratio=2, canonical_size=canonical,
    )  # fmt: skip
    np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-5)
