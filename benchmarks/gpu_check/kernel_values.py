"""Compares the kernels' values with those of their CPU builds, torchvision, OpenCV and numpy."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from context import Context
from kernel_inputs import (
    CANONICAL,
    CELLS,
    DETECTIONS,
    FULL_HD,
    SAMPLES,
    STRIDES,
    boxes_with_ties,
    empty,
    instances,
    mask_edges,
    mask_inputs,
    nms_on_device,
    noise_pyramid,
    nv12,
    on_cpu,
    put,
    roi_align,
    run_launch,
)  # fmt: skip
from rows import Check, Figure, UnavailableError

if TYPE_CHECKING:
    from torch import Tensor

    from comask.kernels.launch import Launch

# torchvision's kernel is compiled with contraction of products and sums, ours without.
TORCHVISION = {False: 5e-4, True: 4.5e-3}  # by whether maps are f16: two roundings of 2^-11 more
LAYOUTS = {
    "f32": (False, False), "f32 channels last": (False, True),
    "f16": (True, False), "f16 channels last": (True, True),
}  # fmt: skip
TORCH = "PyTorch on the GPU"  # what other rows need
PADDING = 8 - 3  # channels: those of a tensor in TensorRT's HWC8 layout


def torch_gpu(context: Context) -> Figure:
    """Adds numbers with PyTorch on the GPU, which also creates its context."""
    import torch

    if not context.rehearsal and not torch.cuda.is_available():
        raise UnavailableError(f"torch {torch.__version__} does not see the GPU")
    start = time.perf_counter()
    total = float(torch.ones(1000, device=context.device).sum())
    note = f"{time.perf_counter() - start:.1f} s with its context"
    return Figure(value=total, least=1000, most=1000, note=note)


def compile_all(context: Context) -> Figure:
    """Compiles and loads all kernels for the GPU from an empty cache."""
    import torch

    from comask.kernels import compile, run

    device = torch.device("cpu") if context.rehearsal else torch.device("cuda", 0)
    start = time.perf_counter()
    for path in sorted(compile.FOLDER.glob("*.cu")):
        if not run.available(path.stem, device):
            raise UnavailableError("the kernels cannot be compiled here; comask doctor says why")
    return Figure(value=time.perf_counter() - start, unit="s", note="with what the cache held")


def from_cache(context: Context) -> Figure:
    """Compiles a kernel into an empty cache and reads it from there."""
    import os
    import tempfile

    from comask.kernels import compile

    times = []
    with tempfile.TemporaryDirectory() as folder:
        old, os.environ["COMASK_CACHE"] = os.environ.get("COMASK_CACHE"), folder
        try:
            for _ in range(2):
                start = time.perf_counter()
                compile.cubin("sorted_nms", _capability())
                times.append(time.perf_counter() - start)
        finally:
            del os.environ["COMASK_CACHE"]
            if old is not None:
                os.environ["COMASK_CACHE"] = old
    return Figure(
        value=times[1] / times[0],
        unit="of the first time",
        most=0.5,
        note=f"{times[0]:.2f} s first",
    )


def from_ptx(context: Context) -> Figure:
    """Loads a kernel as PTX, which the driver compiles, and compares its values."""
    import ctypes

    import torch

    from comask.kernels import compile, run
    from comask.kernels.launch import nms_launch, pack

    boxes, groups = boxes_with_ties(20, 200)
    launch = nms_launch(20, 200, 0.5)
    expected = on_cpu(launch, [boxes, groups], torch.empty(20, 200, dtype=torch.bool))
    torch.zeros(1, device="cuda")
    run.use_primary_context(0)
    driver = ctypes.CDLL("libcuda.so.1")
    text = compile.ptx("sorted_nms", _capability()) + b"\0"
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    status = driver.cuModuleLoadData(ctypes.byref(module), text)
    status = status or driver.cuModuleGetFunction(ctypes.byref(function), module, b"sorted_nms")
    if status:
        raise RuntimeError(f"the driver does not load the PTX: {status}")
    inputs, keep = (
        [boxes.cuda(), groups.cuda()],
        torch.zeros(20, 200, dtype=torch.bool, device="cuda"),
    )
    arguments = pack(launch, [tensor.data_ptr() for tensor in inputs], keep.data_ptr())
    torch.cuda.synchronize()
    status = driver.cuLaunchKernel(
        function, launch.grid, 1, 1, launch.block, 1, 1, 0, None, arguments, None
    )
    torch.cuda.synchronize()
    if status:
        raise RuntimeError(f"the kernel does not start: {status}")
    return Figure(value=float((keep.cpu() != expected).sum()), unit="boxes", most=0)


def roi_values(context: Context, *, half: bool, channels_last: bool, padding: int = 0) -> Figure:
    """Compares RoIAlign with its CPU build, for both sizes of the network."""
    maps, rois = noise_pyramid(context, half=half, channels_last=channels_last, padding=padding)
    worst = 0.0
    for size in (7, 14):
        launch, inputs, pooled = roi_align(maps, rois, size, padding=padding)
        run_launch(launch, inputs, pooled)
        worst = max(worst, _difference(launch, inputs, pooled))
    return Figure(value=worst, most=0.0)


def roi_against_torchvision(context: Context, *, half: bool) -> Figure:
    """Compares RoIAlign with torchvision's operator, which computes in f32 on the same device."""
    from comask.models.roi_align import pyramid_roi_align

    worst = 0.0
    for channels_last in (False, True):
        maps, rois = noise_pyramid(context, half=half, channels_last=channels_last)
        for size in (7, 14):
            ours = pyramid_roi_align(
                maps, rois, size, sampling_ratio=SAMPLES, canonical_size=CANONICAL
            )
            # in f32 throughout, because half-precision boxes would be wrong by half a pixel
            expected = torchvision_pool([m.float().contiguous() for m in maps], rois, size)
            worst = max(worst, float((ours.float() - expected).abs().max()))
    return Figure(value=worst, most=TORCHVISION[half])


def torchvision_pool(maps: list[Tensor], rois: Tensor, size: int) -> Tensor:
    """Pools with torchvision's operator level by level, as its `MultiScaleRoIAlign` does."""
    import torch
    import torchvision

    from comask.models.roi_align import roi_levels

    levels = roi_levels(rois[0], CANONICAL)
    pooled = maps[0].new_empty((rois.shape[1], maps[0].shape[1], size, size))
    for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        chosen = torch.where(levels == level)[0]
        boxes = [rois[0, chosen].to(features.dtype)]
        pooled[chosen] = torchvision.ops.roi_align(
            features, boxes, size, 1 / stride, SAMPLES, aligned=True
        )
    return pooled


def nms_values(context: Context) -> Figure:
    """Compares the keep sets of as many boxes as the network has with the CPU's kernel."""
    from comask.kernels.launch import nms_launch

    boxes, groups = boxes_with_ties(5, context.sizes.proposals)
    queue, keep = nms_on_device(context, boxes, groups, 0.7)
    queue()
    launch = nms_launch(*groups.shape, 0.7)
    return Figure(value=_difference(launch, [boxes, groups], keep), unit="boxes", most=0)


def nms_against_torchvision(context: Context) -> Figure:
    """Counts the rows of NMS whose keep set differs from torchvision's, ties included."""
    import torch
    import torchvision

    from comask.models.nms import sorted_nms

    rows, count = 200, 300
    boxes, groups = boxes_with_ties(rows, count)
    keep = sorted_nms(boxes.to(context.device), groups.to(context.device), 0.5).cpu()
    rank = torch.arange(count, 0, -1, dtype=torch.float32)
    wrong = 0
    for row in range(rows):
        kept = torchvision.ops.batched_nms(boxes[row], rank, groups[row].long(), 0.5)
        expected = torch.zeros(count, dtype=torch.bool)
        expected[kept] = True
        wrong += int(not torch.equal(expected, keep[row]))
    return Figure(value=float(wrong), unit=f"of {rows} rows", most=0)


def rgb_values(context: Context) -> Figure:
    """Compares the canvas of an RGB frame with OpenCV's resize, in grey levels."""
    from comask.config import PreprocessConfig
    from comask.kernels.launch import rgb_to_canvas_launch
    from comask.preprocess import prepare

    frame = np.random.default_rng(0).integers(0, 256, (*FULL_HD, 3), np.uint8)
    expected = prepare(frame, PreprocessConfig())
    shape = expected.canvas.shape[:2]
    launch = rgb_to_canvas_launch(FULL_HD, frame.strides, expected.size, shape)
    canvas = empty(context, (*shape, 3), "uint8")
    run_launch(launch, [put(context, frame)], canvas)
    worst = np.abs(canvas.cpu().numpy().astype(int) - expected.canvas).max()
    return Figure(value=float(worst), unit="levels", most=0)


def frame_values(context: Context) -> Figure:
    """Compares the canvases of NV12, planar and odd frames with the kernel's CPU build."""
    from comask.kernels.launch import rgb_to_canvas_launch

    worst = 0.0
    for launch, inputs, canvas in (
        nv12(context), nv12(context, (77, 103), 128), nv12(context, (480, 640), 640),
    ):  # fmt: skip
        run_launch(launch, inputs, canvas)
        worst = max(worst, _difference(launch, inputs, canvas))
    planes = np.random.default_rng(1).integers(0, 256, (3, 77, 103), np.uint8)
    launch = rgb_to_canvas_launch((77, 103), (103, 1, 77 * 103), (96, 128), (96, 128), order="bgr")
    inputs, canvas = [put(context, planes)], empty(context, (96, 128, 3), "uint8")
    run_launch(launch, inputs, canvas)
    return Figure(value=max(worst, _difference(launch, inputs, canvas)), unit="levels", most=0)


def edge_values(context: Context) -> Figure:
    """Counts the edges of masks that differ from numpy's."""
    from comask.masks import edges_by_numpy

    probs, boxes = instances(context)
    size = (context.sizes.height, context.sizes.width)
    counts, edges = mask_edges(context, mask_inputs(context))
    expected_counts, expected = edges_by_numpy(probs, boxes, size, 0.5)
    found_counts, found = counts.cpu().numpy()[:DETECTIONS], edges.cpu().numpy()[: len(expected)]
    wrong = int((found_counts != expected_counts).sum() + (found != expected).sum())
    return Figure(value=float(wrong), unit=f"of {len(expected)} edges", most=0)


def bitmap_values(context: Context) -> Figure:
    """Counts the pixels of pasted masks that differ from numpy's."""
    from comask.kernels.launch import MaskLaunches
    from comask.masks import paste_masks

    probs, boxes = instances(context)
    size = (context.sizes.height, context.sizes.width)
    pasted = empty(context, (DETECTIONS, *size), "uint8")
    run_launch(MaskLaunches(DETECTIONS, CELLS, size, 0.5).bitmaps(), mask_inputs(context), pasted)
    expected = paste_masks(probs, boxes, size, 0.5)
    wrong = int((pasted.cpu().numpy() != expected).sum())
    return Figure(value=float(wrong), unit=f"of {expected.size} pixels", most=0)


def captured(context: Context) -> Figure:
    """Replays both custom operators in torch's CUDA graph on other data and compares with calls."""
    import torch

    from comask.models.nms import sorted_nms
    from comask.models.roi_align import pyramid_roi_align

    maps, rois = noise_pyramid(context, half=True, channels_last=True)
    groups = torch.zeros(rois.shape[:2], dtype=torch.int32, device="cuda")

    def both() -> tuple[Tensor, Tensor]:
        pooled = pyramid_roi_align(maps, rois, 7, sampling_ratio=SAMPLES, canonical_size=CANONICAL)
        return pooled, sorted_nms(rois, groups, 0.5)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled, keep = both()
    rois += 5.0
    graph.replay()
    torch.cuda.synchronize()
    expected, kept = both()
    wrong = float((pooled.float() - expected.float()).abs().max()) + float((keep != kept).sum())
    return Figure(value=wrong, unit="difference", most=0.0)


def _difference(launch: Launch, inputs: list[Tensor], output: Tensor) -> float:
    expected = on_cpu(launch, inputs, output)
    return float((output.cpu().float() - expected.float()).abs().max())


def _capability() -> int:
    from comask.kernels.compile import ARCHITECTURES
    from comask.runtime.gpu import find_gpu

    gpu = find_gpu()
    return gpu.capability if gpu else ARCHITECTURES[0]


def checks() -> list[Check]:
    """Returns the rows of the group."""
    compiler, cpu = "C++ compiler", "the kernel's CPU build, bit for bit"
    needs = ("kernels", compiler)
    contraction = "compiled code contracts, reorders or races"
    return [
        Check(
            name="PyTorch sees the GPU", run=torch_gpu, compared="a sum of ones", provides=TORCH,
            fails="PyTorch was built for other GPUs or a newer driver", needs=("GPU", "torch"), limit=60,
        ),
        Check(
            name="kernels compile and load", run=compile_all, compared="nothing: it must work",
            fails="NVRTC, nvcc or the driver rejects a source or a module",
            needs=(TORCH, "torchvision", "CUDA compiler"), provides="kernels", limit=90,
        ),
        *(
            Check(
                name=f"RoIAlign equals its CPU build, {name}", compared=cpu, fails=contraction,
                run=partial(roi_values, half=half, channels_last=last), needs=needs,
            )
            for name, (half, last) in LAYOUTS.items()
        ),
        Check(
            name="RoIAlign equals its CPU build, padded channels", compared=cpu,
            fails="it reads or writes TensorRT's padding of channels as channels", needs=needs,
            run=partial(roi_values, half=True, channels_last=True, padding=PADDING),
        ),
        *(
            Check(
                name=f"RoIAlign equals torchvision's, {'f16' if half else 'f32'}",
                run=partial(roi_against_torchvision, half=half), needs=("kernels",),
                compared="torchvision's operator in f32, level by level, on the same device",
                fails="samples, levels or borders differ; contraction alone differs by less",
            )
            for half in (False, True)
        ),
        Check(
            name="NMS equals its CPU build", run=nms_values, needs=needs,
            compared="the kernel for CPUs, which takes one launch in place of two",
            fails="a race between a block's threads, or a contracted IoU",
        ),
        Check(
            name="NMS keeps what torchvision keeps", run=nms_against_torchvision, needs=("kernels",),
            compared="torchvision's batched_nms on the CPU, equal overlaps included",
            fails="a tie at the threshold is rounded to the other side",
        ),
        Check(
            name="frame to canvas equals OpenCV's, RGB", run=rgb_values, needs=("kernels", "opencv"),
            compared="cv2.resize", fails="a pixel is rounded to another level",
        ),
        Check(
            name="frame to canvas equals its CPU build, NV12 and planes", run=frame_values, needs=needs,
            compared=cpu, fails="pitches, odd sizes or colours are read differently",
        ),
        Check(
            name="edges of masks equal numpy's", run=edge_values, needs=("kernels",),
            compared="comask.masks.edges_by_numpy", fails="a bisection ends at another pixel",
        ),
        Check(
            name="pasted masks equal numpy's", run=bitmap_values, needs=("kernels", compiler),
            compared="comask.masks.paste_masks", fails="a pixel at a mask's edge differs",
        ),
        Check(
            name="custom operators replayed in torch's CUDA graph", run=captured,
            needs=("kernels", "real GPU"), compared="the same operators called on the new data",
            fails="a launch is not captured, or keeps old arguments",
        ),
        Check(
            name="a kernel as PTX, compiled by the driver", run=from_ptx, needs=(*needs, "real GPU"),
            compared=cpu, fails="the driver refuses the PTX that newer GPUs than the compiler get",
        ),
        Check(
            name="compiled kernels come from the cache", run=from_cache,
            needs=("kernels", "CUDA compiler"),
            compared="the time to compile the same source", fails="the second use compiles again",
        ),
    ]  # fmt: skip
