"""The stand-in TensorRT as a real driver runs it: a worker computes, no Python is in a stream."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_threads import in_threads
from standin import live, run_on_standin, skip_without_pycuda
from test_stream import eight_threads, replayed_graphs_and_eager
from test_stream_masks import bitmaps_and_rles

from comask.runtime.device import open_device

skip_without_pycuda()
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a stand-in driver that has host functions."""
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1",
         HERE / "standin_host.c", "-o", folder / "libcuda.so.1", "-ldl"],
        check=True,
    )  # fmt: skip
    return str(folder)


def errors_are_told(folder: str) -> None:
    import standin_tensorrt
    import standin_worker

    graph = str(Path(folder, "stage2_roi_head.onnx"))
    inputs = {name: (np.float32, (1,), (1,)) for name in ("no", "such")}
    with open_device() as device:
        outputs = {"boxes": (np.float32, (4,), (4,))}
        job = standin_worker.Job(standin_tensorrt.driver, graph, inputs, outputs, 0)
        stream = device.stream()
        blocks = {name: device.memory(256) for name in (*inputs, *outputs)}
        job.queue(stream.handle, {name: block.address for name, block in blocks.items()}, None)
        result = np.zeros(4, np.float32)
        stream.copy_out(result, blocks["boxes"])
        stream.synchronize()
        stream.close()
        for block in blocks.values():
            block.free()
    assert (result == -1).all()
    (error,) = standin_worker.errors()
    assert "boxes" in error or "no" in error
    assert live() == {}


def threads_share_one_worker(folder: str) -> None:
    """A second one would unmap the memory of the first one's jobs, which crashed the process."""
    import standin_tensorrt
    import standin_worker

    graph = str(Path(folder, "stage2_roi_head.onnx"))
    made, start = list[object](), standin_worker.Worker.__init__

    def counted(self: Any, driver: Any) -> None:
        made.append(self)
        time.sleep(0.2)  # long enough for every thread to arrive
        start(self, driver)

    standin_worker.Worker.__init__ = counted  # type: ignore[method-assign]
    device = open_device()

    def make(_: int) -> None:
        with device:
            standin_worker.Job(standin_tensorrt.driver, graph, {}, {}, 0)

    assert in_threads(8, make) == []
    assert len(made) == 1


@pytest.mark.parametrize(
    "function",
    [errors_are_told, threads_share_one_worker, replayed_graphs_and_eager,
     pytest.param(eight_threads, marks=pytest.mark.slow),
     pytest.param(bitmaps_and_rles, marks=pytest.mark.slow)],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_on_a_driver_like_a_real_one(
    function: Any, driver: str, micro_bundle: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(micro_bundle, tmp_path / "bundle")
    run_on_standin(function, folder, LD_LIBRARY_PATH=driver)
