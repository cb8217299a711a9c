"""Whether int8 engines are worth their loss: their times beside those of fp16 on the GPU at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Bundle, Manifest, update_manifest
from comask.errors import PrecisionError
from comask.export.verify import why_not_proved
from comask.runtime.backends.trt import open_engines
from comask.runtime.bench.timing import take_turns
from comask.runtime.device import find_gpu
from comask.runtime.predictor import Predictor
from comask.runtime.trt.engine_folder import EngineFolder, find_engines

RUNS = 50
Images = Sequence[NDArray[np.uint8]]


def compare_speed(
    bundle: Bundle,
    built: Sequence[EngineFolder],
    images: Callable[[], Images],
    report: Callable[[str], None],
) -> Bundle:
    """Compares int8 engines with fp16 ones where there are both and a GPU that runs them.

    The times go into the manifest.

    Args:
        bundle: of the engines.
        built: engines that were just built; those of their flavor and plugin are compared.
        images: gives u8 [h, w, 3] RGB images where they are needed.
        report: takes a line for each comparison.

    Raises:
        PrecisionError: when int8 is not faster; its engines are gone then.
    """
    gpu, kinds = find_gpu(), {(folder.info.flavor, folder.info.plugin) for folder in built}
    for kind in sorted(kinds):
        pair = {
            folder.info.precision: folder
            for folder in find_engines(bundle)
            if (folder.info.flavor, folder.info.plugin) == kind
            and folder.info.precision in ("fp16", "int8")
            and not why_not_proved(folder.info, gpu)
        }
        if len(pair) < 2:
            continue
        seconds = measure_speed(bundle, pair, images())
        try:
            require_faster(seconds)
        except PrecisionError:
            shutil.rmtree(pair["int8"].folder)
            raise

        def record(manifest: Manifest, seconds: dict[str, float] = seconds) -> Manifest:
            int8 = manifest.verification["int8"] | {"latency": seconds}
            return dataclasses.replace(
                manifest, verification=manifest.verification | {"int8": int8}
            )

        bundle = update_manifest(bundle.folder, record)
        report(
            f"{pair['int8'].folder}: {1e3 * seconds['int8']:.2f} ms an image in both graphs, fp16 takes "
            f"{1e3 * seconds['fp16']:.2f} ms"
        )
    return bundle


def measure_speed(
    bundle: Bundle, engines: Mapping[str, EngineFolder], images: Images
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
