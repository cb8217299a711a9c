"""RoIAlign's forward and backward on a CPU: torchvision's against `dense_roi_align`.

python benchmarks/roi_align.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch
import torchvision
from torch import Tensor

from comask.models.roi_align import dense_roi_align

RUNS = 10


def seconds(align: Callable[[], Tensor]) -> float:
    """The median of several forward and backward passes."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        align().sum().backward()
        times.append(time.perf_counter() - started)
    return sorted(times)[RUNS // 2]


@click.command()
def main() -> None:
    """Print the ratio for the maps and RoIs of `shapes-tiny`'s two branches, and for larger maps."""
    torch.manual_seed(0)
    click.echo("map      RoIs  S   torchvision ms  dense ms  ratio")
    for height, width, rois, size in [
        (24, 32, 256, 7), (24, 32, 64, 14), (64, 64, 256, 7), (64, 64, 64, 14), (100, 168, 64, 14),
    ]:  # fmt: skip
        features = torch.randn(8, 64, height, width, requires_grad=True)
        corner = torch.rand(rois, 2) * torch.tensor([width, height]) * 2
        image = torch.randint(0, 8, (rois, 1)).float()
        rows = torch.cat((image, corner, corner + 5 + torch.rand(rois, 2) * 50), dim=1)
        theirs = seconds(
            lambda f=features, r=rows, s=size: torchvision.ops.roi_align(
                f, r, s, 0.25, 2, aligned=True
            )
        )
        ours = seconds(lambda f=features, r=rows, s=size: dense_roi_align(f, r, s, 0.25, 2))
        click.echo(
            f"{height:>3}x{width:<4} {rois:<5} {size:<3} {theirs * 1e3:<15.1f} {ours * 1e3:<9.1f} "
            f"{theirs / ours:.1f}"
        )


if __name__ == "__main__":
    main()
