"""Compares our conversion of mask probabilities to COCO's RLE with pycocotools on whole masks.

Run it with one CPU thread:

OMP_NUM_THREADS=1 python benchmarks/paste_and_rle.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from comask import masks

RUNS = 7
SIZE = (800, 1333)
COUNT = 100


def instances() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns blurred discs of 28 x 28 and boxes with sides of 16 to 500 pixels, as in COCO."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28]
    centres = 13.5 + rng.normal(0, 2, (2, COUNT, 1, 1))
    probs = 1 / (1 + np.exp(np.hypot(x - centres[0], y - centres[1]) - 9))
    side, aspect = (
        np.exp(rng.uniform(np.log(16), np.log(500), COUNT)),
        np.exp(rng.normal(0, 0.4, COUNT)),
    )
    sides = np.minimum(np.stack((side * aspect, side / aspect), 1), np.array(SIZE)[::-1] - 1)
    corner = rng.uniform(0, np.array(SIZE)[::-1] - sides)
    return probs.astype(np.float32), np.concatenate((corner, corner + sides), 1).astype(np.float32)


def whole_masks(probs: NDArray[np.float32], boxes: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Encodes masks of the image's size with pycocotools, as is common without comask."""
    pasted = masks.paste_masks(probs, boxes, SIZE, 0.5)
    columns_first = np.asfortranarray(pasted.transpose(1, 2, 0).view(np.uint8))
    return [rle | {"counts": rle["counts"].decode()} for rle in coco.encode(columns_first)]


def by_mask(probs: NDArray[np.float32], boxes: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Does the same mask by mask, which copies less at a time."""
    rles = []
    for mask in masks.paste_masks(probs, boxes, SIZE, 0.5):
        rle = coco.encode(np.asfortranarray(mask.view(np.uint8)))
        rles.append(rle | {"counts": rle["counts"].decode()})
    return rles


def by_numpy(probs: NDArray[np.float32], boxes: NDArray[np.float32]) -> list[dict[str, Any]]:
    return masks.rles_from_edges(*masks.edges_by_numpy(probs, boxes, SIZE, 0.5), SIZE)


def by_kernel(probs: NDArray[np.float32], boxes: NDArray[np.float32]) -> list[dict[str, Any]]:
    return masks.rles_from_mask_probs(probs, boxes, SIZE, 0.5)


@click.command()
def main() -> None:
    """Print the median milliseconds of each method, run in turns, and its ratio to pycocotools."""
    probs, boxes = instances()
    ways: dict[str, Callable[..., list[dict[str, Any]]]] = {
        "whole masks, pycocotools on all": whole_masks,
        "whole masks, pycocotools one by one": by_mask,
        "ours, numpy": by_numpy,
        "ours, kernel built by g++": by_kernel,
    }
    if not masks._kernel_compiles():
        del ways["ours, kernel built by g++"]
    results = [way(probs, boxes) for way in ways.values()]
    if any(result != results[0] for result in results):
        raise click.ClickException("the RLEs differ")
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(RUNS):
        for way, taken in zip(ways.values(), times, strict=True):
            started = time.perf_counter()
            way(probs, boxes)
            taken.append(time.perf_counter() - started)
    medians = [sorted(taken)[RUNS // 2] for taken in times]
    click.echo(f"{COUNT} masks, {SIZE[0]}x{SIZE[1]}, all strings equal{'':<8}ms   ratio")
    for name, median in zip(ways, medians, strict=True):
        fastest = min(medians[:2])
        click.echo(f"{name:<40}{median * 1e3:>9.2f}{fastest / median:>8.1f}")


if __name__ == "__main__":
    main()
