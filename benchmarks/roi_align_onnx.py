"""Measures both ONNX bodies of PyramidRoiAlign on ONNX Runtime, and compares them with torchvision.

python benchmarks/roi_align_onnx.py [--height 800 --width 1344 --channels 256]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torchvision.ops import roi_align

from comask.export.functions import DOMAIN, OPSET, pyramid_roi_align_function
from comask.export.trt_functions import pyramid_roi_align_by_grid_sample
from comask.models.roi_align import STRIDES, roi_levels

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
    parser.add_argument("--repeats", type=int, default=5)
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
        for name, function in bodies.items():
            run = session(function, size)
            error = np.abs(run.run(None, feeds)[0] - expected).max()
            seconds = []
            for _ in range(args.repeats):
                start = time.perf_counter()
                run.run(None, feeds)
                seconds.append(time.perf_counter() - start)
            print(f"{count} RoIs {size}x{size} {name}: {min(seconds):.3f} s, max abs {error:.1e}")


if __name__ == "__main__":
    main()
