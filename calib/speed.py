"""Compares the speed of int8 with that of other precisions: engines on a GPU, OpenVINO on a CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comask.bundle import STAGES, Bundle, Manifest, update_manifest, with_graphs
from comask.errors import PrecisionError
from comask.runtime.backends.base import Stages
from comask.runtime.backends.trt import open_engines
from comask.runtime.bench.timing import Measured, take_turns
from comask.runtime.gpu import find_gpu
from comask.runtime.predictor import Predictor
from comask.runtime.trt.engine_folder import EngineFolder, find_engines, why_not_proved

RUNS = 50
CPU_RUNS = 8
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
            require_faster(seconds, "this GPU", "the int8 engines were removed, use fp16")
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
    return _medians(measured)


def measure_on_cpu(
    bundle: Bundle, int8: Mapping[str, Path], images: Images
) -> dict[str, float] | None:
    """Returns the median seconds per image in both graphs on OpenVINO, by precision, in turns.

    Args:
        bundle: the bundle with the fp32 graphs, which also run in bf16 if this processor has it.
        int8: the int8 graph of each stage.
        images: u8 [h, w, 3], RGB.

    Returns:
        None if OpenVINO is not installed.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    from comask.runtime.backends.openvino import OpenVinoStage, precisions_on, settings_for

    alone = [[image] for image in images]
    with contextlib.ExitStack() as stack:
        predictors = {}
        for precision in set(precisions_on("cpu")) & {"fp32", "bf16", "int8"}:
            graphs = int8 if precision == "int8" else {s: bundle.graph(s, "fp32") for s in STAGES}
            settings = settings_for("CPU", precision)
            first, second = (OpenVinoStage(graphs[stage], "CPU", settings) for stage in STAGES)
            stages = Stages(f"openvino:{precision}", first, second)
            predictors[precision] = stack.enter_context(
                Predictor(stages, bundle.manifest.preprocess, max_batch=1)
            )
        measured = take_turns(predictors, dict.fromkeys(predictors, alone), runs=CPU_RUNS)
    return _medians(measured)


def _medians(measured: Mapping[str, Measured]) -> dict[str, float]:
    return {
        precision: float(np.median(np.add(timing.seconds["stage1"], timing.seconds["stage2"])))
        for precision, timing in measured.items()
    }


def require_faster(seconds: Mapping[str, float], where: str, remedy: str) -> None:
    """Checks that int8 is faster than every other precision.

    Args:
        seconds: by precision.
        where: the device in words.
        remedy: the end of the error's sentence.

    Raises:
        PrecisionError: int8 takes at least as long as another precision.
    """
    best = min(seconds.keys() - {"int8"}, key=lambda precision: seconds[precision])
    if seconds["int8"] >= seconds[best]:
        raise PrecisionError(
            f"int8 is not faster than {best} on {where}: {1e3 * seconds['int8']:.2f} ms per image, "
            f"{best} takes {1e3 * seconds[best]:.2f} ms; {remedy}"
        )
