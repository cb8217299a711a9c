"""Plugins in Python, called as TensorRT calls them, with kernels that the stand-in driver runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from standin import run_on_standin, skip_without_pycuda
from torchvision.ops import batched_nms

from comask.errors import BackendUnavailableError
from comask.runtime.device import open_device
from comask.runtime.trt.flavor import load_flavor
from comask.runtime.trt.ops import NmsKeepOp, NmsOverlapsOp
from comask.runtime.trt.plugins import _creators


def desc(array: np.ndarray, kind: str) -> SimpleNamespace:
    """A `PluginTensorDesc`."""
    return SimpleNamespace(
        dims=array.shape, type=SimpleNamespace(name=kind), format=SimpleNamespace(name="LINEAR")
    )


def boxes_and_groups(rows: int, boxes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in order of their scores, as SortedNms takes them."""
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 60, (rows, boxes, 2))
    sides = random.uniform(4, 40, (rows, boxes, 2))
    groups = random.integers(0, 3, (rows, boxes))
    return np.concatenate([corners, corners + sides], 2).astype(np.float32), groups.astype(np.int32)


def launches_are_kept_by_shape() -> None:
    """NMS, whose two plugins hand words to each other, in the order that TensorRT calls them."""
    flavor = load_flavor("tensorrt-rtx")
    creators = {creator.name: creator for creator in _creators(flavor)}
    bits = SimpleNamespace(name="iou_threshold", data=np.array([0.5], np.float32))
    overlaps = creators[NmsOverlapsOp.name].create_plugin("overlaps", [bits], None)
    keeps = creators[NmsKeepOp.name].create_plugin("keep", [], None)
    computed: list[Any] = []

    class Counted(NmsOverlapsOp):
        def launch(self, inputs: Any) -> Any:
            computed.append([tensor.shape for tensor in inputs])
            return NmsOverlapsOp.launch(self, inputs)

    overlaps.op = Counted(0.5)
    with open_device() as device:
        overlaps, keeps = overlaps.attach_to_context(None), keeps.attach_to_context(None)
        stream = device.stream()
        for call, (rows, boxes) in enumerate([(2, 40), (2, 40), (1, 70), (1, 70), (2, 40)]):
            found, groups = boxes_and_groups(rows, boxes, call)
            words = np.empty((rows, -(-boxes // 32), boxes), np.int32)
            keep = np.empty(groups.shape, bool)
            memory = [device.memory(a.nbytes) for a in (found, groups, words, keep)]
            stream.copy_in(memory[0], found)
            stream.copy_in(memory[1], groups)
            stream.synchronize()
            places = [part.address for part in memory]
            overlaps.enqueue(
                [desc(found, "FLOAT"), desc(groups, "INT32")], [desc(words, "INT32")],
                places[:2], places[2:3], 0, stream.handle,
            )  # fmt: skip
            keeps.enqueue(
                [desc(words, "INT32")], [desc(keep, "BOOL")],
                places[2:3], places[3:], 0, stream.handle,
            )  # fmt: skip
            stream.copy_out(keep, memory[3])
            stream.synchronize()
            for row in range(rows):
                scores = torch.linspace(1, 0, boxes)
                best = batched_nms(
                    torch.from_numpy(found[row]), scores, torch.from_numpy(groups[row]), 0.5
                )
                assert sorted(best.tolist()) == np.flatnonzero(keep[row]).tolist()
            for part in memory:
                part.free()
        stream.close()
    assert flavor.plugin_errors == []
    assert [shapes[1] for shapes in computed] == [(2, 40), (1, 70), (2, 40)]


def test_launches_are_kept_by_shape() -> None:
    skip_without_pycuda()
    try:
        load_flavor("tensorrt-rtx")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    run_on_standin(launches_are_kept_by_shape)
