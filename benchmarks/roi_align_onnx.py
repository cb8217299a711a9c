"""Measures both ONNX bodies of PyramidRoiAlign on ONNX Runtime against comask's own kernel.

All are compared with torchvision's values, and they take turns.

python benchmarks/roi_align_onnx.py [--height 800 --width 1344 --channels 256]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torchvision.ops import roi_align

from comask.export.functions import DOMAIN, OPSET, pyramid_roi_align_function
from comask.export.trt_functions import pyramid_roi_align_by_grid_sample
from comask.models.roi_align import STRIDES, pyramid_roi_align, roi_levels

CANONICAL, RATIO = 224.0, 2
MAPS = ("p2", "p3", "p4", "p5")


def session(function: onnx.FunctionProto, size: int) -> onnxruntime.InferenceSession:
    """Returns a session for a graph with only this node."""
    node = helper.make_node(
        function.name, [*MAPS, "rois"], ["pooled"], domain=DOMAIN, output_size=size,
        sampling_ratio=RATIO, canonical_size=CANONICAL,
    )  # fmt: skip
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
        for name, rank in (*((name, 4) for name in MAPS), ("rois", 3), ("pooled", 4))
    ]
    graph = helper.make_graph([node], "one_op", values[:-1], values[-1:])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def by_session(run: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return run.run(None, feeds)[0]


def by_kernel(pyramid: list[np.ndarray], rois: np.ndarray, size: int) -> np.ndarray:
    maps, boxes = [torch.from_numpy(features) for features in pyramid], torch.from_numpy(rois)
    pooled = pyramid_roi_align(maps, boxes, size, sampling_ratio=RATIO, canonical_size=CANONICAL)
    return pooled.numpy()


def by_torchvision(pyramid: list[np.ndarray], rois: np.ndarray, size: int) -> np.ndarray:
    flat = torch.from_numpy(rois[0])
    rows, levels = torch.cat((torch.zeros(len(flat), 1), flat), dim=1), roi_levels(flat, CANONICAL)
    pooled = torch.zeros(len(rows), pyramid[0].shape[1], size, size)
    for level, (features, stride) in enumerate(zip(pyramid, STRIDES, strict=True)):
        chosen = levels == level
        pooled[chosen] = roi_align(
            torch.from_numpy(features), rows[chosen], size, 1 / stride, RATIO, aligned=True
        )
    return pooled.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1344)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shapes = [(1, args.channels, args.height // s, args.width // s) for s in STRIDES]
    pyramid = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    extent = [args.width, args.height]
    bodies = {
        "RoiAlign": pyramid_roi_align_function(),
        "GridSample": pyramid_roi_align_by_grid_sample(),
    }
    for count, size in ((1000, 7), (100, 14)):
        corner = rng.uniform(0, 1, (1, count, 2)) * extent
        side = np.exp(rng.uniform(1, 6.5, corner.shape))
        rois = np.concatenate([corner, np.minimum(corner + side, extent)], 2).astype(np.float32)
        feeds = {**dict(zip(MAPS, pyramid, strict=True)), "rois": rois}
        expected = by_torchvision(pyramid, rois, size)
        sessions = {name: session(function, size) for name, function in bodies.items()}
        runs: dict[str, Callable[[], np.ndarray]] = {
            name: partial(by_session, run, feeds) for name, run in sessions.items()
        }
        runs["kernel"] = partial(by_kernel, pyramid, rois, size)
        errors = {name: np.abs(run() - expected).max() for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        own = np.median(seconds["kernel"])
        for name, found in seconds.items():
            median = np.median(found)
            print(f"{count} RoIs {size}x{size} {name}: {1e3 * median:.0f} ms, {median / own:.2f} times "
                  f"the kernel's, max abs {errors[name]:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
