"""Is int8 faster than fp16 on the GPU at hand? If it is not, nobody wants it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from comask.runtime.bench.parts import take_turns
from comask.runtime.predictor import Predictor
from numpy.typing import NDArray

from comask.bundle import Bundle
from comask.errors import PrecisionError

RUNS = 50


def measure_speed(
    bundle: Bundle, flavor: str, images: Sequence[NDArray[np.uint8]]
) -> dict[str, float]:
    """Median seconds an image in both graphs, of `fp16` and `int8` engines that take turns.

    Args:
        bundle: with engines of both that run here.
        flavor: `tensorrt` or `tensorrt-rtx`.
        images: u8 [h, w, 3], RGB.
    """
    predictors = {
        precision: Predictor.load(bundle.folder, f"{flavor}:{precision}", max_batch=1)
        for precision in ("fp16", "int8")
    }
    alone = [[image] for image in images]
    batches = dict.fromkeys(predictors, alone)
    try:
        measured = take_turns(predictors, batches, runs=RUNS)
    finally:
        for predictor in predictors.values():
            predictor.close()
    return {
        precision: float(np.median(np.add(found.seconds["stage1"], found.seconds["stage2"])))
        for precision, found in measured.items()
    }


def require_faster(seconds: Mapping[str, float]) -> None:
    """Refuses int8 that gains nothing.

    Raises:
        PrecisionError: when it takes as long as fp16.
    """
    if seconds["int8"] >= seconds["fp16"]:
        raise PrecisionError(
            f"int8 is not faster than fp16 on this GPU: {1e3 * seconds['int8']:.2f} ms an image against "
            f"{1e3 * seconds['fp16']:.2f} ms; its engines are removed, use fp16"
        )
