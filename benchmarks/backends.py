"""Backends of a bundle end to end and stage by stage, taking turns in one run.

python benchmarks/backends.py BUNDLE --backend torch --backend onnxruntime
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click
import numpy as np
from comask.runtime import Predictor
from numpy.typing import NDArray


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", "backends", multiple=True, default=("torch", "onnxruntime"),
              show_default=True, help="The first is the reference.")  # fmt: skip
@click.option("--size", default="800x1333", show_default=True, help="Of the image, HxW.")
@click.option("--runs", default=5, show_default=True)
def main(bundle: Path, backends: tuple[str, ...], size: str, runs: int) -> None:
    """Median seconds of one image: preparation, both stages, detections; and the ratio of the sums."""
    height, width = map(int, size.split("x"))
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    predictors = {name: Predictor.load(bundle, name, max_batch=1) for name in backends}
    times: dict[str, list[NDArray[np.float64]]] = {name: [] for name in backends}
    for turn in range(runs + 1):
        for name, predictor in predictors.items():
            found = timed(predictor, image)
            if turn:  # the first is a warm-up
                times[name].append(found)
    heads = ("prepare", "stage 1", "stage 2", "results", "sum")
    print(f"{'backend':24}" + "".join(f"{head:>10}" for head in heads) + f"{'ratio':>8}")
    reference = None
    for name, rows in times.items():
        parts = [statistics.median(column) for column in zip(*rows, strict=True)]
        total = sum(parts)
        reference = reference or total
        print(
            f"{name:24}"
            + "".join(f"{p:10.3f}" for p in (*parts, total))
            + f"{reference / total:8.2f}"
        )


def timed(predictor: Predictor, image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Seconds of each part of one prediction."""
    marks = [time.perf_counter()]
    prepared = predictor.prepare(image)
    marks.append(time.perf_counter())
    feeds = {
        "images": prepared.canvas[None], "image_sizes": np.array([prepared.size], dtype=np.int32),
    }  # fmt: skip
    features = predictor.stages.stage1.run(feeds)
    marks.append(time.perf_counter())
    outputs = predictor.stages.stage2.run({**features, "image_sizes": feeds["image_sizes"]})
    marks.append(time.perf_counter())
    (detections,) = predictor.detections(outputs, [prepared])
    detections.to_rle()
    marks.append(time.perf_counter())
    return np.diff(marks)


if __name__ == "__main__":
    main()
