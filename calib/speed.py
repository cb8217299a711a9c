"""Compares the speed of int8 engines with fp16 engines on this machine's GPU."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Bundle, Manifest, update_manifest, with_graphs
from comask.errors import PrecisionError
from comask.runtime.backends.trt import open_engines
from comask.runtime.bench.timing import take_turns
from comask.runtime.gpu import find_gpu
from comask.runtime.predictor import Predictor
from comask.runtime.trt.engine_folder import EngineFolder, find_engines, why_not_proved

RUNS = 50
Images = Sequence[NDArray[np.uint8]]


def compare_speed(
    bundle: Bundle,
    built: Sequence[EngineFolder],
    images: Callable[[], Images],
    report: Callable[[str], None],
) -> Bundle:
    """Compares int8 engines with fp16 engines, if the bundle has both and this GPU can run them.

    The times go into the manifest.

    Args:
        bundle: the engines' bundle.
        built: the engines that were just built; engines of their flavors and plugins are compared.
        images: returns u8 [h, w, 3] RGB images; called only if they are needed.
        report: called with a line for each comparison.

    Raises:
        PrecisionError: int8 is not faster; its engines have been removed.
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
            return with_graphs(manifest, {}, {"int8": int8})

        bundle = update_manifest(bundle.folder, record)
        report(
            f"{pair['int8'].folder}: {1e3 * seconds['int8']:.2f} ms per image in both graphs, fp16 takes "
            f"{1e3 * seconds['fp16']:.2f} ms"
        )
    return bundle


def measure_speed(
    bundle: Bundle, engines: Mapping[str, EngineFolder], images: Images
) -> dict[str, float]:
    """Returns the median seconds per image in both graphs, by precision; the engines take turns.

    Args:
        bundle: the engines' bundle.
        engines: the engines by precision; this GPU must be able to run them.
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
        precision: float(np.median(np.add(timing.seconds["stage1"], timing.seconds["stage2"])))
        for precision, timing in measured.items()
    }


def require_faster(seconds: Mapping[str, float]) -> None:
    """Checks that int8 is faster than fp16.

    Raises:
        PrecisionError: int8 takes at least as long as fp16.
    """
    if seconds["int8"] >= seconds["fp16"]:
        raise PrecisionError(
            f"int8 is not faster than fp16 on this GPU: {1e3 * seconds['int8']:.2f} ms per image, fp16 "
            f"takes {1e3 * seconds['fp16']:.2f} ms; the int8 engines were removed, use fp16"
        )
