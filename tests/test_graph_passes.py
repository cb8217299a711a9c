"""The passes for TensorRT: what they remove, and that what they put in its place computes the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from compared import compare
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from strategies import FEW, noise_images, seeds
from test_functions import random_boxes, session
from torchvision.ops import roi_align

from comask.bundle import Bundle
from comask.export.functions import DOMAIN, sorted_nms_function
from comask.export.trt_functions import (
    pyramid_roi_align_by_grid_sample,
    with_plugins,
    without_plugins,
)
from comask.models.nms import sorted_nms
from comask.models.roi_align import STRIDES, roi_levels
from comask.runtime.backends.base import Stages
from comask.runtime.backends.ort import OrtSession
from comask.runtime.tolerances import TOLERANCES

MAPS = ("p2", "p3", "p4", "p5")
LACKING = {"NonZero", "NonMaxSuppression", "RoiAlign"}  # in TensorRT-RTX, or without a GPU


@pytest.fixture(scope="module")
def bundle(micro_bundle: Path) -> Bundle:
    return Bundle.open(micro_bundle)


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Those of loops as well."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g.node)


def joined(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes, with a `SortedNms` in place of the two nodes of NMS."""
    result: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type == "NmsKeep":
            assert node.input == result[-1].output
            assert {a.name for a in node.attribute} == {"plugin_namespace", "plugin_version"}
            assert node.name != result[-1].name
            result[-1].op_type, result[-1].name = "SortedNms", node.name.removesuffix("/keep")
            result[-1].output[:] = node.output
        else:
            result.append(onnx.NodeProto())
            result[-1].CopyFrom(node)
    return result


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_with_plugins_functions_go_and_nms_is_two_nodes(bundle: Bundle, stage: str) -> None:
    model = onnx.load(bundle.graph(stage, "fp32"))
    assert model.functions
    stripped = with_plugins(model)
    assert model == onnx.load(bundle.graph(stage, "fp32"))  # the argument stays as it was
    assert not stripped.functions
    nodes = joined(stripped.graph.node)
    for node in model.graph.node:
        if node.op_type in ("CutRows", "PadRows"):  # an engine has all rows
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]
    assert nodes == list(model.graph.node)
    del stripped.graph.node[:]
    stripped.graph.node.extend(nodes)
    assert stripped.graph == model.graph


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_nodes_for_plugins_say_which(bundle: Bundle, stage: str) -> None:
    stripped = with_plugins(onnx.load(bundle.graph(stage, "fp32")))
    names = [node.name for node in stripped.graph.node]
    assert len({*names}) == len(names)
    for node in (node for node in stripped.graph.node if node.domain == DOMAIN):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"comask"
        assert attributes["plugin_version"] == b"1"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_without_plugins_only_standard_ops_stay(bundle: Bundle, stage: str) -> None:
    model = onnx.load(bundle.graph(stage, "fp32"))
    replaced = without_plugins(model)
    assert model == onnx.load(bundle.graph(stage, "fp32"))
    onnx.checker.check_model(replaced, full_check=True)
    assert not replaced.functions
    assert [entry.domain for entry in replaced.opset_import] == [""]
    nodes = list(all_nodes(replaced.graph.node))
    assert {node.domain for node in nodes} == {""}
    assert not LACKING & {node.op_type for node in nodes}
    assert [o.name for o in replaced.graph.output] == [o.name for o in model.graph.output]


@pytest.mark.parametrize(("height", "width"), [(96, 128), (64, 320)])
def test_without_plugins_computes_the_same(
    bundle: Bundle, tmp_path: Path, height: int, width: int
) -> None:
    sessions: dict[str, list[OrtSession]] = {"as exported": [], "without plugins": []}
    for stage in ("stage1", "stage2"):
        path = bundle.graph(stage, "fp32")
        onnx.save(without_plugins(onnx.load(path)), tmp_path / f"{stage}.onnx")
        sessions["as exported"].append(OrtSession(path))
        sessions["without plugins"].append(OrtSession(tmp_path / f"{stage}.onnx"))
    images = noise_images(2, height, width).numpy()
    sizes = np.array([[height, width], [height - 9, width - 20]], np.int32)
    backends = (Stages(name, *pair) for name, pair in sessions.items())
    result = compare(*backends, images, sizes, TOLERANCES["fp32"])
    assert result.failures == []
    assert result.detections > 0


def grid_sample_session(
    size: int, canonical: float, ratio: int = 2
) -> onnxruntime.InferenceSession:
    return session(
        pyramid_roi_align_by_grid_sample(),
        {**dict.fromkeys(MAPS, (TensorProto.FLOAT, 4)), "rois": (TensorProto.FLOAT, 3)},
        ("pooled", TensorProto.FLOAT),
        4,
        output_size=size, sampling_ratio=ratio, canonical_size=canonical, canonical_level=4,
        strides=list(STRIDES), aligned=1,
    )  # fmt: skip


def by_torchvision(
    pyramid: list[np.ndarray], rois: np.ndarray, size: int, canonical: float, ratio: int = 2
) -> np.ndarray:
    batch, count = rois.shape[:2]
    flat = torch.from_numpy(rois.reshape(-1, 4))
    image = torch.arange(batch).repeat_interleave(count)[:, None].float()
    rows, levels = torch.cat((image, flat), dim=1), roi_levels(flat, canonical)
    pooled = torch.zeros(len(rows), pyramid[0].shape[1], size, size)
    for level, (features, stride) in enumerate(zip(pyramid, STRIDES, strict=True)):
        chosen = levels == level
        pooled[chosen] = roi_align(
            torch.from_numpy(features), rows[chosen], size, 1 / stride, ratio, aligned=True
        )
    return pooled.numpy()


def random_pyramid(
    rng: np.random.Generator, batch: int, channels: int, height: int, width: int
) -> list[np.ndarray]:
    shapes = [(batch, channels, height // s, width // s) for s in STRIDES]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("height", "width", "batch", "size", "canonical"),
    [(800, 1344, 1, 7, 224.0), (1344, 800, 2, 14, 224.0), (32, 32, 1, 7, 56.0),
     (32, 640, 3, 14, 112.0)],
)  # fmt: skip
def test_grid_sample_pools_as_torchvision(
    height: int, width: int, batch: int, size: int, canonical: float
) -> None:
    rng = np.random.default_rng(height + size)
    pyramid = random_pyramid(rng, batch, 6, height, width)
    corner = rng.uniform(-40, 1, (batch, 300, 2)) + rng.uniform(0, 1, (batch, 300, 2)) * [
        width,
        height,
    ]
    side = np.exp(rng.uniform(0, np.log(2 * max(height, width)), corner.shape))  # far outside, too
    rois = np.concatenate([corner, corner + side], 2).astype(np.float32)
    rois[:, ::5, 2:] = rois[:, ::5, :2]  # without an area
    rois[:, 1::7] = [0, 0, width, height]  # to the maps' very edges
    (pooled,) = grid_sample_session(size, canonical).run(
        None, {**dict(zip(MAPS, pyramid, strict=True)), "rois": rois}
    )
    expected = by_torchvision(pyramid, rois, size, canonical)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-4)


@FEW
@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_neighbours_in_the_atlas_do_not_shine_through(seed: int, size: int, ratio: int) -> None:
    """Each level's map is one number: whatever is sampled inside an image is the number of its level."""
    rng = np.random.default_rng(seed)
    pyramid = [
        np.full((1, 1, 128 // s, 96 // s), 10.0**place, np.float32)
        for place, s in enumerate(STRIDES)
    ]
    corner = rng.uniform(0, 1, (1, 20, 2)) * [96, 128]
    far = corner + rng.uniform(0, 1, corner.shape) * ([96, 128] - corner)
    rois = np.concatenate([corner, far], 2).astype(np.float32)
    levels = roi_levels(torch.from_numpy(rois), 32.0).numpy()
    (pooled,) = grid_sample_session(size, 32.0, ratio).run(
        None, {**dict(zip(MAPS, pyramid, strict=True)), "rois": rois}
    )
    expected = np.broadcast_to((10.0**levels).reshape(-1, 1, 1, 1), pooled.shape)
    np.testing.assert_allclose(pooled, expected, rtol=1e-3)


@pytest.mark.parametrize(("count", "spread"), [(300, 20.0), (300, 200.0), (3000, 0.5)])
def test_nms_counts_in_f16_exactly(count: int, spread: float) -> None:
    """The last case suppresses a box by more than 2048, where f16 no longer counts by ones."""
    run = session(
        sorted_nms_function(count_type=TensorProto.FLOAT16),
        {"boxes": (TensorProto.FLOAT, 3), "group_ids": (TensorProto.INT32, 2)},
        ("keep", TensorProto.BOOL),
        2,
        iou_threshold=0.25,
    )
    rng = np.random.default_rng(count)
    boxes = random_boxes(rng, 1, count, spread)
    if spread < 1:
        boxes[..., 2:] = boxes[..., :2] + 30
    ids = np.zeros((1, count), np.int32)
    (keep,) = run.run(None, {"boxes": boxes, "group_ids": ids})
    expected = sorted_nms(torch.from_numpy(boxes), torch.from_numpy(ids), 0.25).numpy()
    np.testing.assert_array_equal(keep, expected)
