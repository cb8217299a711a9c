"""Measures backends for `comask bench`: seconds of each part, images per second, memory.

Backends take turns, so that other load affects all of them alike. The medians are recorded in the bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comask.bundle import Bundle, Manifest, update_manifest
from comask.errors import BackendUnavailableError, BundleError, EngineError, KernelError, one_line
from comask.preprocess import Pixels
from comask.progress import Progress
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.base import Stages
from comask.runtime.bench.machine import Report, describe_machine
from comask.runtime.bench.memory import PeakMemory, peak_memory
from comask.runtime.bench.timing import (
    SUM,
    Measured,
    Percentiles,
    StreamTiming,
    canvas_of,
    check_batch,
    full_batches,
    measure_stream,
    take_turns,
)
from comask.runtime.parity.open_backends import openvino_backends
from comask.runtime.predictor import Predictor
from comask.runtime.trt.engine_folder import find_engines

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendLatency:
    """The figures of one backend; memory is a fresh process's, and None if it cannot be measured.

    Attributes:
        runs_as: backend and precision.
        device: the device that it ran on: `cpu`, `cuda:0`, ….
        milliseconds: the time of a batch, by `timing.PARTS` and `timing.SUM`.
        ratio: the reference's median sum divided by this backend's; above 1 if this one is faster.
        images_per_second: the rate for batches one after the other.
        outside_stages: the median share of a batch's time outside both stages.
        detections_per_image: the average number of detections per image.
        cores_busy: CPU seconds per second.
        warm_ups: the number of batches before the measured ones.
        resident_bytes: peak of the system's memory.
        gpu_bytes: bytes of the GPU's memory for calls one by one.
        stream: times of batches in a stream; None if the backend takes frames one at a time anyway.
    """

    runs_as: str
    device: str
    milliseconds: dict[str, Percentiles]
    ratio: float
    images_per_second: float
    outside_stages: float
    detections_per_image: float
    cores_busy: float
    warm_ups: int
    resident_bytes: int | None
    gpu_bytes: int | None
    stream: StreamTiming | None

    @classmethod
    def of(
        cls,
        stages: Stages,
        measured: Measured,
        reference: Measured,
        memory: PeakMemory,
        stream: StreamTiming | None,
    ) -> BackendLatency:
        """Computes the figures from a backend's measurements."""
        seconds = {part: np.array(values) for part, values in measured.seconds.items()}
        outside = 1 - (seconds["stage1"] + seconds["stage2"]) / seconds[SUM]
        return cls(
            runs_as=stages.backend,
            device=stages.device,
            milliseconds={part: Percentiles.of(values) for part, values in seconds.items()},
            ratio=reference.median / measured.median,
            images_per_second=measured.images_per_second,
            outside_stages=float(np.median(outside)),
            detections_per_image=measured.detections_per_image,
            cores_busy=measured.cores,
            warm_ups=measured.warm_ups,
            resident_bytes=memory.resident,
            gpu_bytes=memory.gpu,
            stream=stream and dataclasses.replace(stream, gpu_bytes=memory.stream),
        )


@dataclass(frozen=True, kw_only=True)
class LatencyReport(Report):
    """The figures of all backends, with the images and the setting.

    Attributes:
        subject: the images in words.
        batch: the number of images that ran together.
        proposals: the number of proposals per image; None for the bundle's.
        short_side: shorter side of the resized images in pixels; None for the bundle's.
        runs: the number of batches that each backend ran.
        reference: name of the backend with which `ratio` compares.
        canvases: (H, W) of the images' canvases.
        backends: the figures by name, the reference's first.
    """

    subject: str
    batch: int
    proposals: int | None
    short_side: int | None
    runs: int
    reference: str
    canvases: list[tuple[int, int]]
    backends: dict[str, BackendLatency]


def runnable(bundle: Bundle, named: Sequence[str], how: LoadOptions) -> list[str]:
    """Returns the backends that run here; each is opened once to find out.

    Args:
        bundle: the bundle to run.
        named: backends that must run. If empty, all that the bundle has graphs or engines for, PyTorch
            first; those that do not run are logged.
        how: the options with which to open them.

    Raises:
        ComaskError: if a named backend does not run, or none does.
    """
    running = []
    for name in dict.fromkeys(named or _held_backends(bundle)):
        try:
            Predictor.open(bundle.folder, name, how).close()
        except (BackendUnavailableError, BundleError, EngineError, KernelError) as error:
            if named:
                raise
            logger.warning("left out: %s: %s", name, one_line(error))
        else:
            running.append(name)
    if not running:
        raise BackendUnavailableError(
            f"none of the backends of {bundle.folder} runs here; comask doctor says what is missing"
        )
    return running


def _held_backends(bundle: Bundle) -> list[str]:
    """Returns all backends and precisions that the bundle has graphs or engines for, PyTorch first."""
    engines = {f"{engine.info.flavor}:{engine.info.precision}" for engine in find_engines(bundle)}
    graphs = [f"onnxruntime:{precision}" for precision in bundle.manifest.precisions]
    return ["torch", *graphs, *openvino_backends(bundle), *sorted(engines)]


def measure_latency(
    bundle: Bundle,
    names: Sequence[str],
    how: LoadOptions,
    images: Sequence[Pixels],
    *,
    subject: str,
    runs: int,
    warm_ups: int | None = None,
) -> LatencyReport:
    """Measures backends in turn.

    Args:
        bundle: the bundle to measure.
        names: names of backends that run here, see `runnable`; the first is the reference.
        how: the options with which to open them.
        images: the images to run, repeated if needed.
        subject: the images in words.
        runs: the number of batches to measure on each backend.
        warm_ups: the number of batches before them; None to run until they get no faster.

    Raises:
        ComaskError: if a backend does not run, or runs fewer images together than requested.
    """
    machine = describe_machine(how.device)  # before this process causes load
    memory = _memory(bundle, names, how, images)  # before this process takes memory itself
    with contextlib.ExitStack() as stack:
        predictors = {
            name: stack.enter_context(Predictor.open(bundle.folder, name, how)) for name in names
        }
        for predictor in predictors.values():
            check_batch(predictor, how.max_batch)
        preprocess = predictors[names[0]].preprocess
        batches = full_batches(images, preprocess, how.max_batch)
        progress = stack.enter_context(Progress("measuring", runs, unit="turns"))
        measured = take_turns(
            predictors, dict.fromkeys(names, batches),
            runs=runs, warm_ups=warm_ups, advance=progress.advance,
        )  # fmt: skip
        # backends without a GPU run a stream's frames one by one, which was measured already
        streams = {
            name: measure_stream(predictor, batches, runs=runs)
            for name, predictor in predictors.items()
            if predictor.stages.gpu is not None
        }
        backends = {
            name: BackendLatency.of(
                predictor.stages,
                measured[name],
                measured[names[0]],
                memory[name],
                streams.get(name),
            )
            for name, predictor in predictors.items()
        }
    return LatencyReport(
        bundle=str(bundle.folder), machine=machine, subject=subject, batch=how.max_batch,
        proposals=how.proposals, short_side=how.short_side, runs=runs, reference=names[0],
        canvases=sorted({canvas_of(image, preprocess) for image in images}), backends=backends,
    )  # fmt: skip


def _memory(
    bundle: Bundle, names: Sequence[str], how: LoadOptions, images: Sequence[Pixels]
) -> dict[str, PeakMemory]:
    """Measures each backend's peak memory with the image that needs the largest canvas."""
    preprocess = bundle.manifest.preprocess
    largest = max(images, key=lambda image: math.prod(canvas_of(image, preprocess)))
    height, width, _ = largest.shape
    memory = {}
    with Progress("memory", len(names), unit="backends") as progress:
        for name in names:
            memory[name] = peak_memory(bundle.folder, name, (height, width), how)
            progress.advance()
            if memory[name].problem:
                logger.warning("warning: memory of %s: %s", name, memory[name].problem)
    return memory


def record_latency(report: LatencyReport) -> None:
    """Writes the medians to the manifest, in place of older ones of the same backend, device and batch.

    A report of another setting than the bundle's own is not recorded; a warning says so.
    """
    folder = Path(report.bundle)
    manifest = Bundle.open(folder).manifest
    own = (manifest.model.proposals, manifest.preprocess.short_side)
    if (report.proposals or own[0], report.short_side or own[1]) != own:
        logger.warning("not recorded in the bundle, because this is another setting than its own")
        return
    latency = {
        f"{figures.runs_as} on {figures.device}, batch {report.batch}": {
            "seconds": {part: value.p50 / 1000 for part, value in figures.milliseconds.items()},
            "device": figures.device,
            "when": report.when,
            "machine": dataclasses.asdict(report.machine),
            "subject": report.subject,
            "canvases": report.canvases,
            "batch": report.batch,
            "runs": report.runs,
        }
        for figures in report.backends.values()
    }

    def change(manifest: Manifest) -> Manifest:
        return dataclasses.replace(manifest, latency=(manifest.latency or {}) | latency)

    try:
        update_manifest(folder, change)
    except OSError as error:
        logger.warning("warning: the result is not recorded in the bundle: %s", error)
