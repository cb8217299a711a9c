"""Compares the custom operators on a CPU with torchvision's in one run.

python benchmarks/roi_align.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch
import torchvision
from torch import Tensor

from comask.models.nms import sorted_nms
from comask.models.roi_align import STRIDES, dense_roi_align, pool_rows, roi_levels

RUNS = 9
HEIGHT, WIDTH, CHANNELS = 800, 1344, 256  # the canvas, and the channels of ResNet-50's pyramid


def seconds(*functions: Callable[[], object]) -> list[float]:
    """Returns the median seconds of each function; the functions run in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(RUNS):
        for function, taken in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return [sorted(taken)[RUNS // 2] for taken in times]


def report(what: str, theirs: float, ours: float) -> None:
    click.echo(f"{what:<38}{theirs * 1e3:>14.2f}{ours * 1e3:>10.2f}{theirs / ours:>7.2f}")


def torchvision_by_level(maps: list[Tensor], rows: Tensor, size: int) -> Tensor:
    """Does what `MultiScaleRoIAlign` does, with `aligned=True`."""
    levels = roi_levels(rows[:, 1:], 224.0)
    pooled = maps[0].new_empty(len(rows), maps[0].shape[1], size, size)
    for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        chosen = torch.where(levels == level)[0]
        pooled[chosen] = torchvision.ops.roi_align(
            features, rows[chosen], size, 1 / stride, 2, aligned=True
        )
    return pooled


def some_boxes(count: int) -> Tensor:
    """Returns boxes [count, 4] inside the image, with sides from 16 to 600 pixels."""
    side = 16 * 2 ** (torch.rand(count, 2) * 5.2)
    centre = torch.rand(count, 2) * torch.tensor([WIDTH, HEIGHT])
    limit = torch.tensor([WIDTH, HEIGHT] * 2)
    return torch.cat((centre - side / 2, centre + side / 2), dim=1).clamp(min=0).minimum(limit)


def forward() -> None:
    maps = [torch.randn(1, CHANNELS, HEIGHT // s, WIDTH // s) for s in STRIDES]
    last = [features.to(memory_format=torch.channels_last) for features in maps]
    for count, size in ((1000, 7), (100, 14)):
        rows = torch.cat((torch.zeros(count, 1), some_boxes(count)), dim=1)
        assert (
            pool_rows(maps, rows, size, 2, 224.0) - torchvision_by_level(maps, rows, size)
        ).abs().max() <= 1e-5
        for name, layout in (("[B, C, H, W]", maps), ("channels-last", last)):
            theirs, ours = seconds(
                lambda m=layout, r=rows, s=size: torchvision_by_level(m, r, s),
                lambda m=layout, r=rows, s=size: pool_rows(m, r, s, 2, 224.0),
            )
            report(f"RoIAlign {count} at {size}, {name}", theirs, ours)


def suppression() -> None:
    boxes, scores = some_boxes(1000), torch.linspace(1, 0, 1000)
    one_group = torch.zeros(1, 1000, dtype=torch.int32)
    theirs, ours = seconds(
        lambda: torchvision.ops.nms(boxes, scores, 0.5),
        lambda: sorted_nms(boxes[None], one_group, 0.5),
    )
    report("NMS of 1000 boxes", theirs, ours)


def training() -> None:
    """Measures forward and backward passes with the maps and RoIs of `shapes-tiny` and larger maps."""
    for height, width, rois, size in [
        (24, 32, 256, 7), (24, 32, 64, 14), (64, 64, 256, 7), (64, 64, 64, 14), (100, 168, 64, 14),
    ]:  # fmt: skip
        features = torch.randn(8, 64, height, width, requires_grad=True)
        corner = torch.rand(rois, 2) * torch.tensor([width, height]) * 2
        image = torch.randint(0, 8, (rois, 1)).float()
        rows = torch.cat((image, corner, corner + 5 + torch.rand(rois, 2) * 50), dim=1)
        theirs, ours = seconds(
            lambda f=features, r=rows, s=size: (
                torchvision.ops.roi_align(f, r, s, 0.25, 2, aligned=True).sum().backward()
            ),
            lambda f=features, r=rows, s=size: dense_roi_align(f, r, s, 0.25, 2).sum().backward(),
        )
        report(f"training, {height}x{width}, {rois} at {size}, dense", theirs, ours)


@click.command()
def main() -> None:
    """Print the milliseconds of torchvision's operators and ours, and their ratio."""
    torch.manual_seed(0)
    click.echo(f"{torch.get_num_threads()} threads{'':<29}torchvision ms   ours ms  ratio")
    forward()
    suppression()
    training()


if __name__ == "__main__":
    main()
