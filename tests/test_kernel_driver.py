"""Launching through the CUDA driver, with a stand-in that runs the kernels' CPU build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from comask.errors import KernelError
from comask.kernels import compile, run
from comask.kernels.launch import nms_launch

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")

# Runs the operators' kernels through the driver and directly, in a process of its own.
SCRIPT = """
import ctypes, threading
import numpy as np
from comask.errors import KernelError
from comask.kernels import run
from comask.kernels.launch import (
    nms_keep_launch, nms_launch, nms_overlaps_launch, roi_align_launch
)

class Record(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("launches", ctypes.c_int), ("loads", ctypes.c_int)]

random = np.random.default_rng(0)
def both(launch, inputs, output):
    addresses = [array.ctypes.data for array in inputs]
    expected = np.zeros_like(output)
    run.on_host(launch, addresses, expected.ctypes.data)
    run.on_gpu(launch, addresses, output.ctypes.data, stream=0x1234)
    record = Record.in_dll(ctypes.CDLL("libcuda.so.1"), "standin_record")
    assert record.grid[:] == [launch.grid, 1, 1] and record.block[:] == [launch.block, 1, 1]
    assert record.shared == 0 and record.stream == 0x1234
    assert expected.any() and np.array_equal(output, expected)
    return record

shapes = [(2, 70, 64 // s, 96 // s) for s in (1, 2, 4, 8)]
maps = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
rois = np.sort(random.uniform(0, 256, (2, 6, 2, 2)).astype(np.float32), axis=2)
roi_align = roi_align_launch(shapes, 12, 6, 7, 2, 100.0, half=False, channels_last=False)
boxes = np.sort(random.uniform(0, 50, (3, 40, 2, 2)).astype(np.float32), axis=2)
nms = nms_launch(3, 40, 0.3)
pooled, kept = np.empty((12, 70, 7, 7), np.float32), np.empty((3, 40), np.uint8)

try:
    run.on_gpu(nms, [0, 0], 0, 0)
except KernelError as error:
    print(error)
run.use_primary_context(0)
run.prepare("sorted_nms")
def work():
    run.use_primary_context(0)
    both(roi_align, [*maps, rois], pooled)
thread = threading.Thread(target=work)
thread.start()
thread.join()
record = both(nms, [boxes, np.zeros((3, 40), np.int32)], kept)
words, halved = np.zeros((3, 2, 40), np.int32), np.empty_like(kept)
both(nms_overlaps_launch(3, 40, 0.3), [boxes, np.zeros((3, 40), np.int32)], words)
both(nms_keep_launch(3, 40), [words], halved)
assert np.array_equal(halved, kept)
record = both(roi_align, [*maps, rois], np.empty_like(pooled))
run.on_gpu(nms_launch(0, 40, 0.3), [0, 0], 0, 0)  # nothing to launch
print(record.launches, "launches of", record.loads, "modules", kept.sum() < 120)
"""


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process with the stand-in."""
    folder = tmp_path_factory.mktemp("standin")
    source = Path(__file__).parent / "standin_cuda.c"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", source, "-o", folder / "libcuda.so.1"]
    subprocess.run([*command, "-ldl"], check=True)
    kernels = [compile.host_library(name)._name for name in ("pyramid_roi_align", "sorted_nms")]
    return os.environ | {"LD_LIBRARY_PATH": str(folder), "STANDIN_KERNELS": ":".join(kernels)}


# The second GPU is newer than every compiler.
@pytest.mark.parametrize(("capability", "warnings"), [("89", 0), ("999", 1)])
def test_kernels_get_their_arguments_grid_and_stream(
    capability: str, warnings: int, standin: dict[str, str]
) -> None:
    out = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SCRIPT],
        env=standin | {"STANDIN_CAPABILITY": capability},
        capture_output=True,
        text=True,
        cwd="/",
    )
    first, *rest = out.stdout.splitlines() or [""]
    assert "no CUDA context is current" in first, out.stderr
    assert rest == ["5 launches of 2 modules True"], out.stderr
    assert len(out.stderr.splitlines()) == warnings
    assert out.stderr.count("does not know compute capability 99.9") == warnings


def test_no_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    run._library.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError(f"no {name}")))
    with pytest.raises(KernelError, match=r"no libcuda\.so\.1; install NVIDIA's driver"):
        run.on_gpu(nms_launch(1, 4, 0.5), [0, 0], 0, 0)


def test_the_stand_in_knows_the_arguments_of_the_kernels_that_wait() -> None:
    """A wrong number would let the stand-in read past a launch's arguments."""
    text = Path(__file__).with_name("standin_launch.h").read_text()
    known = re.findall(r'\{"(\w+)", (\d+), (\d+), NULL\}', text)
    assert len(known) > 3
    sources = "".join(path.read_text() for path in compile.FOLDER.glob("*.cu"))
    for entry, inputs, arguments in known:
        (signature,) = re.findall(rf"^KERNEL\({entry},.*?\)\(([^)]*)\)", sources, re.M | re.S)
        pointers = ["*" in argument for argument in signature.split(",")]
        count = int(inputs)
        assert pointers == [True] * count + [False] * (int(arguments) - count - 1) + [True]
