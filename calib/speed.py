"""Is int8 faster than fp16 on the GPU at hand? If it is not, nobody wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Bundle
from comask.errors import PrecisionError
from comask.runtime.bench.timing import take_turns
from comask.runtime.predictor import Predictor
from comask.runtime.trt.engine_folder import EngineFolder
from comask.runtime.trt.session import open_engines

RUNS = 50


def measure_speed(
    bundle: Bundle, engines: Mapping[str, EngineFolder], images: Sequence[NDArray[np.uint8]]
) -> dict[str, float]:
    """Median seconds an image in both graphs, by precision; the engines take turns.

    Args:
        bundle: of the engines.
        engines: that run here, by precision.
        images: u8 [h, w, 3], RGB.
    """
    alone = [[image] for image in images]
    with contextlib.ExitStack() as stack:
        predictors = {
            precision: stack.enter_context(
                Predictor(open_engines(folder, device=0), bundle.manifest.preprocess, max_batch=1)
            )
            for precision, folder in engines.items()
        }
        measured = take_turns(predictors, dict.fromkeys(predictors, alone), runs=RUNS)
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
