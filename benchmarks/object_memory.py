"""Measures the memory of an image with many objects and of its mask targets in a training step.

python benchmarks/object_memory.py --objects 400 --side 1500
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

MEBIBYTE = 2**20


def peak() -> float:
    """Returns the largest resident memory of this process so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(objects: int, side: int, form: str) -> None:
    """Prints the MiB that the target of one image holds, and the additional peak of this process.

    Args:
        objects: the number of objects in the image, each 40 pixels wide.
        side: the side of the image in pixels.
        form: `crops`, or `bitmaps` of the whole image as until 0.1.
    """
    import torch
    from torchvision.ops import roi_align

    from comask.data.training_set import MaskCrops, Target
    from comask.segmentation import read_segmentation
    from comask.training.targets import mask_targets

    rng = np.random.default_rng(0)
    corners = rng.integers(0, side - 40, (objects, 2)).tolist()
    outlines = [[x, y, x + 40, y, x + 40, y + 40, x, y + 40] for x, y in corners]
    boxes = torch.tensor([[x, y, x + 40, y + 40] for x, y in corners], dtype=torch.float32)
    which = torch.arange(objects)
    before = peak()
    masks = [read_segmentation([outline], side, side) for outline in outlines]
    if form == "bitmaps":
        whole = torch.from_numpy(np.array([mask.bitmap() for mask in masks], np.uint8))
        indexed = torch.cat((which[:, None].float(), boxes), dim=1)
        roi_align(whole[:, None].float(), indexed, (28, 28), 1.0, -1, aligned=True)
        held = whole.numel()
    else:
        crops = MaskCrops.of([mask.crop() for mask in masks], (side, side))
        target = Target(
            boxes=boxes,
            crowds=torch.zeros(0, 4),
            labels=which,
            masks=crops,
            mask_scale=torch.ones(4),
        )
        mask_targets(target, boxes, which, 28)
        held = crops.pixels.numel()
    print(f"{held / MEBIBYTE:.1f} {peak() - before:.0f}")


@click.command()
@click.option("--objects", default=400, show_default=True)
@click.option("--side", default=1500, show_default=True, help="Side of the square image in pixels.")
@click.option("--form", type=click.Choice(["crops", "bitmaps"]), hidden=True)
def main(objects: int, side: int, form: str | None) -> None:
    """Compare cropped masks with bitmaps of the whole image, each in its own process."""
    if form:
        measure(objects, side, form)
        return
    print(f"{objects} objects of 40 x 40 pixels in an image of {side} x {side}, MiB:")
    with TemporaryDirectory() as folder:
        for kind in ("bitmaps", "crops"):
            command = [sys.executable, str(Path(__file__).resolve()), "--form", kind,
                       "--objects", str(objects), "--side", str(side)]  # fmt: skip
            out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            held, most = out.stdout.split()
            print(f"{kind:8} held {held:>8}, peak {most:>6} above the start")


if __name__ == "__main__":
    main()
