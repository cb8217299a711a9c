"""The share of a CPU's time that is not spent in the two graphs, for one image at 800 x 1333.

OMP_NUM_THREADS=2 python benchmarks/outside_the_graphs.py BUNDLE

Decoding files is not part of it; resize, padding, stacking, `Detections`, pasting and RLE are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from comask.runtime import Predictor
from comask.runtime.session import Array, Session, TensorSpec

SIZE = (960, 1600)  # becomes 800 x 1333; masks are pasted at this size


@dataclass
class Timed:
    """A session that adds up its own seconds."""

    session: Session
    seconds: list[float] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The session's."""
        return self.session.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The session's."""
        return self.session.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The session's, timed."""
        started = time.perf_counter()
        result = self.session.run(feeds)
        self.seconds.append(time.perf_counter() - started)
        return result

    def close(self) -> None:
        """The session's."""
        self.session.close()


def timed(call: Callable[[], Any], seconds: list[float]) -> Any:
    started = time.perf_counter()
    result = call()
    seconds.append(time.perf_counter() - started)
    return result


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--runs", default=5, show_default=True, help="Images; one more warms up.")
def main(bundle: Path, backend: str, runs: int) -> None:
    """Print the median milliseconds of every part, and the share of all that is not the graphs."""
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    with Predictor.load(bundle, backend) as predictor:
        stage1, stage2 = Timed(predictor.stages.stage1), Timed(predictor.stages.stage2)
        predictor.stages = replace(predictor.stages, stage1=stage1, stage2=stage2)
        prepare: list[float] = []
        predict: list[float] = []
        encode: list[float] = []
        for _ in range(runs + 1):
            prepared = timed(lambda: predictor.prepare(image), prepare)
            (found,) = timed(lambda p=prepared: predictor.predict_prepared([p]), predict)
            timed(lambda f=found: f.to_rle(), encode)
    graphs = np.add(stage1.seconds, stage2.seconds)
    parts = {
        "resize and pad": np.array(prepare),
        "stage 1": np.array(stage1.seconds),
        "stage 2": np.array(stage2.seconds),
        "stack, detections": predict - graphs,
        f"paste and RLE of {len(found)}": np.array(encode),
    }
    whole = np.sum(list(parts.values()), axis=0)[1:]
    for name, seconds in parts.items():
        click.echo(f"{name:<24}{1e3 * np.median(seconds[1:]):>10.2f} ms")
    share = 100 * np.median(1 - graphs[1:] / whole)
    click.echo(f"{'end to end':<24}{1e3 * np.median(whole):>10.2f} ms")
    click.echo(f"outside the graphs: {share:.2f} % (canvas {list(prepared.canvas.shape[:2])})")


if __name__ == "__main__":
    main()
