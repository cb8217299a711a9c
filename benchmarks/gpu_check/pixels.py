"""Compares the kernels before and after the network with the CPU, and measures their time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from clock import seconds
from context import Context
from rows import Figure, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from comask.kernels.launch import Launch

DETECTIONS = 100
CELLS = 28
FULL_HD = (1080, 1920)
EDGES_PER_COLUMN = 4  # allocated; compact masks need two


def rgb_canvas(context: Context) -> Figure:
    """Compares the canvas of an RGB frame with OpenCV's resize, in grey levels."""
    from comask.config import PreprocessConfig
    from comask.kernels.launch import rgb_to_canvas_launch
    from comask.preprocess import prepare

    frame = np.random.default_rng(0).integers(0, 256, (*FULL_HD, 3), np.uint8)
    expected = prepare(frame, PreprocessConfig())
    shape = expected.canvas.shape[:2]
    launch = rgb_to_canvas_launch(FULL_HD, frame.strides, expected.size, shape)
    canvas = _empty(context, (*shape, 3), "uint8")
    _run(launch, [_put(context, frame)], canvas)
    worst = np.abs(canvas.cpu().numpy().astype(int) - expected.canvas).max()
    return Figure(value=float(worst), unit="levels", most=0)


def nv12_canvas(context: Context) -> Figure:
    """Compares the canvas of an NV12 frame with the same kernel on the CPU, in grey levels."""
    from comask.kernels import run

    launch, planes, canvas = _nv12(context)
    _run(launch, planes, canvas)
    expected = np.empty(tuple(canvas.shape), np.uint8)
    on_host = [plane.cpu().numpy() for plane in planes]
    run.on_host(launch, [plane.ctypes.data for plane in on_host], expected.ctypes.data)
    worst = np.abs(canvas.cpu().numpy().astype(int) - expected).max()
    return Figure(value=float(worst), unit="levels", most=0)


def mask_edges(context: Context) -> Figure:
    """Counts the edges of masks that differ from numpy's."""
    from comask.masks import edges_by_numpy

    probs, boxes = _instances(context)
    size = (context.sizes.height, context.sizes.width)
    counts, edges = _edges(context, _inputs(context, probs, boxes))
    expected_counts, expected = edges_by_numpy(probs, boxes, size, 0.5)
    found_counts, found = counts.cpu().numpy()[:DETECTIONS], edges.cpu().numpy()[: len(expected)]
    wrong = int((found_counts != expected_counts).sum() + (found != expected).sum())
    return Figure(value=float(wrong), unit=f"of {len(expected)} edges", most=0)


def bitmaps(context: Context) -> Figure:
    """Counts the pixels of pasted masks that differ from numpy's."""
    from comask.kernels.launch import MaskLaunches
    from comask.masks import paste_masks

    probs, boxes = _instances(context)
    size = (context.sizes.height, context.sizes.width)
    pasted = _empty(context, (DETECTIONS, *size), "uint8")
    launch = MaskLaunches(DETECTIONS, CELLS, size, 0.5).bitmaps()
    _run(launch, _inputs(context, probs, boxes), pasted)
    expected = paste_masks(probs, boxes, size, 0.5)
    wrong = int((pasted.cpu().numpy() != expected).sum())
    return Figure(value=float(wrong), unit=f"of {expected.size} pixels", most=0)


def nv12_time(context: Context) -> Figure:
    """Times the conversion of a frame of 1920x1080 to a canvas of 800x1344."""
    context.need_gpu()
    launch, planes, canvas = _nv12(context)
    time = seconds(
        lambda: _run(launch, planes, canvas), context.sizes.repeats, context.device
    )  # fmt: skip
    return Figure(value=1e6 * time, unit="us")


def edges_time(context: Context) -> Figure:
    """Times both steps for 100 masks and the copy of their edges to the host."""
    context.need_gpu()
    inputs = _inputs(context, *_instances(context))
    counts, edges = _edges(context, inputs)
    used = int(counts[:DETECTIONS].sum())

    def once() -> None:
        _edges(context, inputs, counts, edges)
        counts[:DETECTIONS].cpu()
        edges[:used].cpu()

    time = seconds(once, context.sizes.repeats, context.device)
    return Figure(value=1e6 * time, unit="us", note=f"{4 * used / 1024:.0f} KiB copied")


def _instances(context: Context) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns blurred discs and boxes from 16 pixels to the canvas height, some beyond its borders."""
    rng = np.random.default_rng(3)
    size = np.array([context.sizes.width, context.sizes.height])
    y, x = np.mgrid[:CELLS, :CELLS]
    centres = (CELLS - 1) / 2 + rng.normal(0, 2, (2, DETECTIONS, 1, 1))
    probs = 1 / (1 + np.exp(np.hypot(x - centres[0], y - centres[1]) - CELLS / 3))
    sides = np.exp(rng.uniform(np.log(16), np.log(size[1]), (DETECTIONS, 2)))
    corner = rng.uniform(-0.1, 1, (DETECTIONS, 2)) * size - sides / 3
    boxes = np.concatenate((corner, corner + sides), axis=1)
    return probs.astype(np.float32), boxes.astype(np.float32)


def _inputs(
    context: Context, probs: NDArray[np.float32], boxes: NDArray[np.float32]
) -> list[Tensor]:
    """Returns the inputs of the mask kernels on the device."""
    found = np.array([len(probs)], np.int32)
    return [_put(context, array) for array in (probs, boxes, found)]


def _edges(
    context: Context, inputs: Sequence[Tensor], counts: Tensor | None = None,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from comask.kernels.launch import MaskLaunches

    size = (context.sizes.height, context.sizes.width)
    capacity = DETECTIONS * size[1] * EDGES_PER_COLUMN
    if counts is None or edges is None:
        counts = _empty(context, (DETECTIONS * (1 + size[1]),), "int32")
        edges = _empty(context, (capacity,), "int32")
    launches = MaskLaunches(DETECTIONS, CELLS, size, 0.5)
    _run(launches.edge_counts(), inputs, counts)
    _run(launches.edges(capacity), [*inputs[:2], counts], edges)
    return counts, edges


def _nv12(context: Context) -> tuple[Launch, list[Tensor], Tensor]:
    from comask.config import PreprocessConfig
    from comask.kernels.launch import nv12_to_canvas_launch
    from comask.preprocess import padded_shape, resized_shape

    (height, width), pitch = FULL_HD, 2048
    rng = np.random.default_rng(4)
    luma = rng.integers(0, 256, (height, pitch), np.uint8)
    chroma = rng.integers(0, 256, (height // 2, pitch), np.uint8)
    resized = resized_shape(FULL_HD, PreprocessConfig())
    canvas = padded_shape(resized, PreprocessConfig())
    launch = nv12_to_canvas_launch(
        FULL_HD, (height // 2, width // 2), (pitch, pitch), resized, canvas,
        matrix="bt709", full_range=False,
    )  # fmt: skip
    return (
        launch,
        [_put(context, luma), _put(context, chroma)],
        _empty(context, (*canvas, 3), "uint8"),
    )


def _put(context: Context, array: NDArray[np.generic]) -> Tensor:
    import torch

    return torch.from_numpy(array).to(context.device)


def _empty(context: Context, shape: tuple[int, ...], dtype: str) -> Tensor:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device=context.device)


def _run(launch: Launch, inputs: Sequence[Tensor], output: Tensor) -> None:
    from comask.kernels import run

    if not run.available(launch.source, output.device):
        raise UnavailableError("the kernels cannot be compiled here; comask doctor says why")
    run.on_tensors(launch, inputs, output)


CHECKS = {
    "frame to canvas equals OpenCV's, RGB": rgb_canvas,
    "frame to canvas equals the CPU's, NV12": nv12_canvas,
    "edges of masks equal numpy's": mask_edges,
    "pasted masks equal numpy's": bitmaps,
    "frame to canvas, time": nv12_time,
    "edges of 100 masks to the host, time": edges_time,
}
