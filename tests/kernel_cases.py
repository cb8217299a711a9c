"""Launches of every kernel with inputs, for tests that run them in unusual ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from comask.kernels import run
from comask.kernels.launch import (
    Launch,
    MaskLaunches,
    nms_keep_launch,
    nms_launch,
    nms_overlaps_launch,
    nv12_to_canvas_launch,
    rgb_to_canvas_launch,
    roi_align_launch,
)


@dataclass(frozen=True)
class Case:
    """A launch, its inputs, and the output's number of bytes."""

    launch: Launch
    inputs: tuple[np.ndarray, ...]
    output: int

    def untouched(self) -> bytes:
        """The output before the launch."""
        return b"\xa5" * self.output

    def one_lane(self) -> bytes:
        """The output by the build that PyTorch uses on a CPU."""
        output = np.frombuffer(bytearray(self.untouched()), np.uint8)
        run.on_host(self.launch, [x.ctypes.data for x in self.inputs], output.ctypes.data)
        return output.tobytes()


def roi_case(
    *, half: bool, channels_last: bool, channels: int, stride: int | None = None, ratio: int = 2,
    grid: int | None = None, rois: int = 3, size: int = 7, image: tuple[int, int] = (192, 256),
) -> Case:  # fmt: skip
    """RoIAlign of noise for RoIs [R, 5] of all levels; some lie across borders, one has NaN."""
    rng = np.random.default_rng(channels)
    dtype, stride = (np.float16 if half else np.float32), stride or channels
    shapes = [(2, channels, image[0] // s, image[1] // s) for s in (4, 8, 16, 32)]
    maps = []
    for batch, count, height, width in shapes:
        values = rng.standard_normal((batch, stride, height, width)).astype(dtype)
        values[:, count:] = 0
        order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
        maps.append(np.ascontiguousarray(values.transpose(order)))
    sides = 8 * np.exp(rng.random((rois, 2)) * np.log(max(image) / 8))
    corners = rng.uniform(-20, image, (rois, 2))[:, ::-1]
    images = rng.integers(0, 2, (rois, 1))
    rows = np.concatenate((images, corners, corners + sides), axis=1).astype(np.float32)
    rows[-1, 2] = np.nan
    launch = roi_align_launch(
        shapes, rois, 0, size, ratio, 56.0, half=half, channels_last=channels_last,
        channel_stride=stride,
    )  # fmt: skip
    launch = replace(launch, grid=grid or launch.grid)
    return Case(launch, (*maps, rows), rois * stride * size**2 * dtype().itemsize)


def roi_cases() -> Iterator[Case]:
    yield roi_case(half=False, channels_last=False, channels=70)
    yield roi_case(half=True, channels_last=False, channels=130, ratio=3, grid=2)
    yield roi_case(half=False, channels_last=True, channels=66, stride=72, grid=3)
    yield roi_case(half=True, channels_last=True, channels=130, stride=136)
    yield roi_case(half=True, channels_last=True, channels=13, grid=2)  # without vectors


def nms_case(rows: int, count: int, *, grid: int | None = None, decimals: int = 7) -> Case:
    """NMS of three groups; boxes of few decimals have equal overlaps."""
    rng = np.random.default_rng(rows * count)
    corner = rng.uniform(0, 200, (rows, count, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(1, 90, (rows, count, 2))), axis=2)
    groups = rng.integers(0, 3, (rows, count), np.int32)
    launch = nms_launch(rows, count, 0.5)
    launch = replace(launch, grid=grid or launch.grid)
    return Case(launch, (boxes.round(decimals).astype(np.float32), groups), rows * count)


def nms_halves(
    rows: int, count: int, *, grid: int | None = None, decimals: int = 7
) -> tuple[Case, Case]:
    """The two launches that compute the same as `nms_case`."""
    inputs = nms_case(rows, count, decimals=decimals).inputs
    launches = nms_overlaps_launch(rows, count, 0.5), nms_keep_launch(rows, count)
    first, second = (replace(launch, grid=grid or launch.grid) for launch in launches)
    tiles = -(-count // 32)
    overlaps = Case(first, inputs, 4 * rows * tiles * count)
    words = np.frombuffer(overlaps.one_lane(), np.int32)
    return overlaps, Case(second, (words,), rows * count)


def nms_cases() -> Iterator[Case]:
    yield nms_case(3, 150, grid=2)
    yield nms_case(1, 33)
    yield nms_case(1, 300)
    yield from nms_halves(3, 150, grid=2)
    yield from nms_halves(1, 33)
    yield nms_halves(1, 1100)[1]  # more boxes than the threads load ahead


def frame_cases() -> Iterator[Case]:
    rng = np.random.default_rng(2)
    size, resized, canvas = (13, 300), (24, 270), (32, 288)
    output = canvas[0] * canvas[1] * 3
    pixels = rng.integers(0, 256, (3, *size), np.uint8)
    for strides in ((900, 3, 1), (300, 1, 3900)):  # packed, planar
        launch = rgb_to_canvas_launch(size, strides, resized, canvas)
        yield Case(replace(launch, grid=2), (pixels,), output)
    chroma = rng.integers(0, 256, (7, 150, 2), np.uint8)
    launch = nv12_to_canvas_launch(
        size, (7, 150), (300, 300), resized, canvas, matrix="bt709", full_range=False
    )
    yield Case(launch, (pixels[0], chroma), output)
    odd = (7, 271)  # groups of four pixels are neither whole nor aligned
    yield Case(
        nv12_to_canvas_launch(
            size, (7, 150), (300, 301), (7, 270), odd, matrix="bt709", full_range=False
        ),
        (pixels[0], np.concatenate((chroma.ravel(), np.zeros(7, np.uint8)))),
        odd[0] * odd[1] * 3,
    )


def mask_cases() -> Iterator[Case]:
    rng = np.random.default_rng(3)
    count, found, cells, (height, width) = 4, np.array([3], np.int32), 28, (40, 300)
    y, x = np.mgrid[:cells, :cells] - (cells - 1) / 2
    disc = 1 / (1 + np.exp(np.hypot(x, y) - cells / 3))
    probs = (disc + rng.uniform(-0.2, 0.2, (count, cells, cells))).astype(np.float32)
    corner = rng.uniform(-10, 20, (count, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(20, 280, (count, 2))), axis=1)
    boxes = boxes.astype(np.float32)
    boxes[0] = (-10, 2, 290, 30)  # of more columns than a block has threads
    launches = MaskLaunches(count, cells, (height, width), 0.5, (1.1, 0.9))
    counting = Case(launches.edge_counts(), (probs, boxes, found), 4 * (count + count * width))
    counts = np.frombuffer(counting.one_lane(), np.int32)
    assert counts[:3].all()
    edges = int(counts[:count].sum())
    bitmaps = Case(launches.bitmaps(), (probs, boxes, found), count * height * width)
    cases = (
        counting,
        Case(launches.edges(edges), (probs, boxes, counts), 4 * edges),
        Case(launches.edges(edges // 2), (probs, boxes, counts), 4 * edges),
        bitmaps,
    )
    for case in cases:
        yield replace(case, launch=replace(case.launch, grid=2))
    yield bitmaps
    # odd sizes, so that most bitmaps begin inside a chunk; several strips
    launches = MaskLaunches(count, cells, (101, 333), 0.5)
    yield Case(launches.bitmaps(), (probs, boxes, found), count * 101 * 333)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "frame_to_canvas": frame_cases,
    "paste_masks": mask_cases,
    "pyramid_roi_align": roi_cases,
    "sorted_nms": nms_cases,
}
