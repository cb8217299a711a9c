"""What one frame asks of the driver, in order: a copy, a wait or a launch that nobody needs would show.

On the stand-in driver, each stage is one piece of work (`network`). The launches of our plugins inside
the stages are counted in the graphs that plans are built from.
"""

from __future__ import annotations

import ctypes
import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from standin import run_on_standin, skip_without_pycuda
from test_stream import PICTURES, GpuFrame, assert_all_freed, start

from comask.bundle import STAGES, Bundle
from comask.export.trt_functions import with_plugins
from comask.runtime import Predictor
from comask.runtime.trt.masks import EDGES
from comask.runtime.trt.ops import OPS

skip_without_pycuda()

OWN_LAUNCHES = 10  # of our own kernels for a frame
HEIGHT, WIDTH = 96, 128
FRAME = np.random.default_rng(1).integers(0, 256, (HEIGHT * 3 // 2, WIDTH), dtype=np.uint8)


def new_lines() -> list[str]:
    """The driver's calls since the last call of this function."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.standin_trace.restype = ctypes.c_char_p
    return str(driver.standin_trace().decode()).splitlines()


def copies_out(predictor: Predictor) -> list[str]:
    """The copies of one image's outputs to the host."""
    return [
        f"  copy out {math.prod(map(int, spec.shape[1:])) * spec.dtype.itemsize}"
        for spec in predictor.stages.stage2.outputs
    ]


def a_video_frame(folder: str) -> None:
    predictor, _ = start(folder)
    frame, outputs = GpuFrame(FRAME), copies_out(predictor)
    (rows,) = {int(s.shape[1]) for s in predictor.stages.stage2.outputs if s.name == "scores"}
    search = [
        "  launch mask_edge_counts", "  launch mask_edges", f"  copy out {4 * rows}",
        f"  copy out {4 * EDGES}",
    ]  # fmt: skip
    canvas = ["wait for another stream", "launch frame_to_canvas_nv12"]
    network = ["launch graph", "  copy in 8", "  network", "  network"]
    with predictor.stream(slots=1) as session:
        for rle, found in ((False, []), (True, search)):
            for call in range(4):  # without a graph, captured and launched, launched twice
                new_lines()
                session.submit(frame, format="nv12", rle=rle).result()
                lines = new_lines()
                if call > 0:
                    assert lines == [*canvas, *network, *found, *outputs, "synchronize event"]
    del frame
    predictor.close()
    assert_all_freed()


def an_image(folder: str) -> None:
    predictor, _ = start(folder)
    outputs = copies_out(predictor)
    images = f"  copy in {HEIGHT * WIDTH * 3}"
    for call in range(4):
        new_lines()
        predictor(PICTURES[0])
        lines = new_lines()
        if call > 0:
            assert lines == [
                "launch graph", images, "  copy in 8", "  network", "  network", *outputs,
                "synchronize event",
            ]  # fmt: skip
    predictor.close()
    assert_all_freed()


def test_own_launches_of_a_frame(micro_bundle: Path) -> None:
    """One for the canvas, one for each operator of both stages, and two to find the masks' edges."""
    bundle, names = Bundle.open(micro_bundle), {op.name for op in OPS}
    graphs = [with_plugins(onnx.load(bundle.graph(stage, "fp32"))).graph for stage in STAGES]
    operators = [node.op_type for graph in graphs for node in graph.node if node.op_type in names]
    assert set(operators) == names
    assert 1 + len(operators) + 2 == OWN_LAUNCHES


@pytest.mark.parametrize("check", [a_video_frame, an_image])
def test_trace(check: object, micro_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(micro_bundle, folder)
    run_on_standin(check, folder)  # type: ignore[arg-type]
