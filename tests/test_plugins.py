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
from comask.runtime.trt.engine import load_flavor
from comask.runtime.trt.ops import SortedNmsOp
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
    flavor = load_flavor("tensorrt-rtx")
    creator = next(c for c in _creators(flavor) if c.name == SortedNmsOp.name)
    bits = SimpleNamespace(name="iou_threshold", data=np.array([0.5], np.float32))
    plugin = creator.create_plugin("nms", [bits], None)
    computed: list[Any] = []

    class Counted(SortedNmsOp):
        def launch(self, inputs: Any) -> Any:
            computed.append([tensor.shape for tensor in inputs])
            return SortedNmsOp.launch(self, inputs)

    plugin.op = Counted(0.5)
    with open_device() as device:
        plugin = plugin.attach_to_context(None)
        stream = device.stream()
        for call, (rows, boxes) in enumerate([(2, 40), (2, 40), (1, 70), (1, 70), (2, 40)]):
            found, groups = boxes_and_groups(rows, boxes, call)
            memory = [device.memory(found.nbytes), device.memory(groups.nbytes)]
            kept, keep = device.memory(groups.size), np.empty(groups.shape, bool)
            stream.copy_in(memory[0], found)
            stream.copy_in(memory[1], groups)
            stream.synchronize()
            plugin.enqueue(
                [desc(found, "FLOAT"), desc(groups, "INT32")], [desc(keep, "BOOL")],
                [part.address for part in memory], [kept.address], 0, stream.handle,
            )  # fmt: skip
            stream.copy_out(keep, kept)
            stream.synchronize()
            for row in range(rows):
                scores = torch.linspace(1, 0, boxes)
                best = batched_nms(
                    torch.from_numpy(found[row]), scores, torch.from_numpy(groups[row]), 0.5
                )
                assert sorted(best.tolist()) == np.flatnonzero(keep[row]).tolist()
            for part in (*memory, kept):
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
