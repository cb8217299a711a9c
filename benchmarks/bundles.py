"""Compares the times of two bundles of one network in ONNX Runtime, such as before and after a change.

Both bundles need a score threshold of 0, as `vs_peers.py` exports them with random weights. For fewer
detections, the threshold in the graphs becomes a score between two detections of the first bundle.
ONNX Runtime's own options for threads and memory are used for the first bundle, comask's for the second.

    python benchmarks/bundles.py OLD NEW --sizes 800x1344,480x800 --detections 100,10
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from thresholds import threshold_for, with_threshold

from comask.bundle import Bundle
from comask.runtime.backends.ort import OrtSession


class Graphs:
    """Both stages of a bundle, with a score threshold of one's own.

    Args:
        bundle: the bundle.
        threshold: the score that a detection must exceed.
        plain: whether ONNX Runtime's own options are used, and not comask's.
    """

    def __init__(self, bundle: Bundle, threshold: float, *, plain: bool) -> None:
        stage1 = onnx.load(bundle.graph("stage1", "fp32"))
        stage2 = with_threshold(onnx.load(bundle.graph("stage2", "fp32")), threshold)
        opened = PlainSession if plain else partial(OrtSession, device="cpu")
        self._sessions = [opened(graph.SerializeToString()) for graph in (stage1, stage2)]

    def run(self, image: np.ndarray) -> tuple[dict[str, Any], list[float]]:
        """Returns stage 2's outputs and the seconds of both stages."""
        values: dict[str, Any] = {
            "images": image, "image_sizes": np.array([image.shape[1:3]], np.int32)
        }  # fmt: skip
        seconds = []
        for session in self._sessions:
            start = time.perf_counter()
            outputs = session.run(values)
            seconds.append(time.perf_counter() - start)
            values |= outputs
        return values, seconds


class PlainSession:
    """A graph with ONNX Runtime's own options for threads and memory."""

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(graph, options, providers=providers)

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Returns the outputs by name; further feeds are ignored."""
        names = [entry.name for entry in self._session.get_outputs()]
        given = {entry.name: feeds[entry.name] for entry in self._session.get_inputs()}
        return dict(zip(names, self._session.run(names, given), strict=True))


@click.command()
@click.argument("bundles", nargs=2, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sizes", default="800x1344,480x800", show_default=True, metavar="HxW,…")
@click.option("--detections", default="100,10", show_default=True, metavar="N,…")
@click.option("--runs", default=4, show_default=True, type=click.IntRange(2))
def main(bundles: tuple[Path, Path], sizes: str, detections: str, runs: int) -> None:
    """Time two bundles in turns and print their ratio as a Markdown table."""
    opened = [Bundle.open(path) for path in bundles]
    click.echo("| canvas | detections | first: stages, ms | second: stages, ms | ratio |")
    click.echo("|---|---|---|---|---|")
    for size in sizes.split(","):
        height, width = map(int, size.split("x"))
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        scores = Graphs(opened[0], 0.0, plain=True).run(image)[0]["scores"][0]
        for count in map(int, detections.split(",")):
            threshold = 0.0 if count >= len(scores) else threshold_for(scores, count)
            both = [Graphs(b, threshold, plain=place == 0) for place, b in enumerate(opened)]
            found = [int(graphs.run(image)[0]["num_detections"][0]) for graphs in both]
            if found != [count, count]:
                raise click.ClickException(f"the bundles found {found} objects, not {count}")
            times = np.array([[graphs.run(image)[1] for graphs in both] for _ in range(runs)])
            first, second = 1000 * np.median(times, axis=0)
            sums = np.median(times.sum(axis=2), axis=0)
            click.echo(
                f"| {size} | {count} | {first[0]:.0f} + {first[1]:.0f} | "
                f"{second[0]:.0f} + {second[1]:.0f} | {sums[0] / sums[1]:.2f} |"
            )


if __name__ == "__main__":
    main()
