"""Makes inputs for the kernels, and runs a launch on the device and on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from context import Context

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from comask.kernels.launch import Launch

STRIDES = (4, 8, 16, 32)
CANONICAL = 224.0
SAMPLES = 2
DETECTIONS = 100
CELLS = 28
FULL_HD = (1080, 1920)
EDGES_PER_COLUMN = 4  # allocated; compact masks need two


def noise_pyramid(
    context: Context, *, half: bool, channels_last: bool, padding: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Returns a pyramid of noise and RoIs from 8 pixels to the canvas size, spread over all levels.

    Args:
        context: the context of the checks.
        half: whether the maps are f16.
        channels_last: the layout of the maps.
        padding: further channels, with noise that nothing may read.
    """
    import torch

    sizes, generator = context.sizes, torch.Generator().manual_seed(2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [
        torch.randn(
            1, sizes.channels + padding, sizes.height // s, sizes.width // s, generator=generator
        )
        .to(context.device, torch.float16 if half else torch.float32)
        .contiguous(memory_format=layout)
        for s in STRIDES
    ]
    count = sizes.proposals
    side = 8 * torch.exp(torch.rand(count, 2, generator=generator) * math.log(sizes.height / 8))
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([sizes.width, sizes.height])
    rois = torch.cat((centre - side / 2, centre + side / 2), dim=1)[None]
    return maps, rois.to(context.device)


def roi_align(
    maps: Sequence[Tensor], rois: Tensor, size: int, *, padding: int = 0
) -> tuple[Launch, list[Tensor], Tensor]:
    """Returns the launch of RoIAlign with its inputs, and memory for its output."""
    import torch

    from comask.kernels.launch import roi_align_launch

    channels = maps[0].shape[1] - padding
    last = maps[0].is_contiguous(memory_format=torch.channels_last)
    launch = roi_align_launch(
        [(len(m), channels, *m.shape[2:]) for m in maps], rois.shape[1], rois.shape[1], size, SAMPLES,
        CANONICAL, half=maps[0].dtype == torch.float16, channels_last=last,
        channel_stride=channels + padding if padding else None,
    )  # fmt: skip
    pooled = torch.empty(
        (rois.shape[1], maps[0].shape[1], size, size), dtype=maps[0].dtype, device=rois.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip
    return launch, [*maps, rois], pooled


def boxes_with_ties(rows: int, count: int) -> tuple[Tensor, Tensor]:
    """Returns boxes [rows, count, 4], by falling score, and groups; many overlaps are equal."""
    import torch

    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(rows, count, 2, generator=generator) * 100
    side = torch.rand(rows, count, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + side), dim=2)
    boxes[::2] = boxes[::2].round()
    return boxes, torch.randint(0, 4, (rows, count), generator=generator, dtype=torch.int32)


def nms_on_device(
    context: Context, boxes: Tensor, groups: Tensor, threshold: float
) -> tuple[Callable[[], None], Tensor]:
    """Returns a call that queues the two launches of NMS, and the memory that it writes `keep` to."""
    from comask.kernels.launch import TILE, nms_keep_launch, nms_overlaps_launch

    rows, count = groups.shape
    inputs = [boxes.to(context.device), groups.to(context.device)]
    words = empty(context, (rows, -(-count // TILE), count), "int32")
    keep = empty(context, (rows, count), "bool")
    overlaps = nms_overlaps_launch(rows, count, threshold)

    def queue() -> None:
        run_launch(overlaps, inputs, words)
        run_launch(nms_keep_launch(rows, count), [words], keep)

    return queue, keep


def instances(context: Context) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
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


def mask_inputs(context: Context) -> list[Tensor]:
    """Returns the inputs of the mask kernels on the device."""
    probs, boxes = instances(context)
    return [put(context, a) for a in (probs, boxes, np.array([DETECTIONS], np.int32))]


def mask_edges(context: Context, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Finds the edges of the masks; returns counts and edges."""
    from comask.kernels.launch import MaskLaunches

    size = (context.sizes.height, context.sizes.width)
    capacity = DETECTIONS * size[1] * EDGES_PER_COLUMN
    counts = empty(context, (DETECTIONS * (1 + size[1]),), "int32")
    edges = empty(context, (capacity,), "int32")
    launches = MaskLaunches(DETECTIONS, CELLS, size, 0.5)
    run_launch(launches.edge_counts(), inputs, counts)
    run_launch(launches.edges(capacity), [*inputs[:2], counts], edges)
    return counts, edges


def nv12(
    context: Context, size: tuple[int, int] = FULL_HD, pitch: int = 2048
) -> tuple[Launch, list[Tensor], Tensor]:
    """Returns the launch of an NV12 frame's conversion, its planes, and memory for the canvas."""
    from comask.config import PreprocessConfig
    from comask.kernels.launch import nv12_to_canvas_launch
    from comask.preprocess import padded_shape, resized_shape

    height, width = size
    chroma = ((height + 1) // 2, (width + 1) // 2)
    rng = np.random.default_rng(4)
    planes = [rng.integers(0, 256, (rows, pitch), np.uint8) for rows in (height, chroma[0])]
    resized = resized_shape(size, PreprocessConfig())
    canvas = padded_shape(resized, PreprocessConfig())
    launch = nv12_to_canvas_launch(
        size, chroma, (pitch, pitch), resized, canvas, matrix="bt709", full_range=False
    )
    return launch, [put(context, p) for p in planes], empty(context, (*canvas, 3), "uint8")


def put(context: Context, array: NDArray[np.generic]) -> Tensor:
    """Returns an array as a tensor on the device."""
    import torch

    return torch.from_numpy(array).to(context.device)


def empty(context: Context, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Returns memory on the device."""
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device=context.device)


def run_launch(launch: Launch, inputs: Sequence[Tensor], output: Tensor) -> None:
    """Runs a launch on the device of its output."""
    from comask.kernels import run

    run.on_tensors(launch, inputs, output)


def on_cpu(launch: Launch, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
    """Returns what the kernel's CPU build makes of the same inputs."""
    import torch

    expected = torch.zeros_like(output, device="cpu", memory_format=torch.preserve_format)
    run_launch(launch, [tensor.cpu() for tensor in inputs], expected)
    return expected
