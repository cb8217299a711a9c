"""What `comask-bench` does without --sweep: the seconds of each part, memory, and their record."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from comask.cli.options import find_files, write_json
from comask.errors import (
    BackendUnavailableError,
    BundleError,
    EngineError,
    ImageError,
    KernelError,
    one_line,
)
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions

if TYPE_CHECKING:
    from comask.bundle import Bundle, Manifest
    from comask.config import PreprocessConfig
    from comask.preprocess import Pixels
    from comask.runtime.bench.memory import PeakMemory
    from comask.runtime.bench.timing import Measured


def runnable(bundle: Bundle, named: tuple[str, ...], how: LoadOptions) -> list[str]:
    """The backends that run here, each opened once to see.

    Args:
        bundle: to run.
        named: on the command line; what of these does not run is an error. Empty: whatever the bundle
            holds, PyTorch first; what of these does not run is reported.
        how: to open them.

    Raises:
        ComaskError: one that was named does not run, or none does.
    """
    found = []
    for name in dict.fromkeys(named or held_backends(bundle)):
        try:
            Predictor.open(bundle.folder, name, how).close()
        except (BackendUnavailableError, BundleError, EngineError, KernelError) as error:
            if named:
                raise
            click.echo(f"left out: {name}: {' '.join(str(error).split())}", err=True)
        else:
            found.append(name)
    if not found:
        raise BackendUnavailableError(
            f"none of the backends that {bundle.folder} is for runs here; comask-doctor says what is "
            f"missing"
        )
    return found


def held_backends(bundle: Bundle) -> list[str]:
    """Every backend and precision that the bundle has graphs or engines for, PyTorch first."""
    from comask.runtime.trt.engine_folder import find_engines

    engines = {f"{engine.info.flavor}:{engine.info.precision}" for engine in find_engines(bundle)}
    graphs = [f"onnxruntime:{precision}" for precision in bundle.manifest.precisions]
    return ["torch", *graphs, *sorted(engines)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What is asked for.

    Attributes:
        bundle: to measure.
        backends: as `Predictor.load` takes them, the reference first; empty for all that run.
        how: they run.
        images: a file or a folder of them; None for noise.
        size: of the noise, HxW; None for the bundle's largest.
        runs: batches, of each backend.
        warm_ups: batches before; None until they get no faster.
        record: whether the manifest is told.
    """

    bundle: Path
    backends: tuple[str, ...]
    how: LoadOptions
    images: Path | None
    size: str | None
    runs: int
    warm_ups: int | None
    record: bool


def run_timing(timing: Timing, plot: Path | None, json_file: str | None) -> None:
    """Measures, prints, draws and records."""
    from comask.bundle import Bundle
    from comask.cli.bench_tables import print_timing
    from comask.runtime.bench.machine import describe_machine

    opened = Bundle.open(timing.bundle)
    pictures, subject = _pictures(timing, opened.manifest)
    names = runnable(opened, timing.backends, timing.how)
    report: dict[str, Any] = {
        "bundle": str(timing.bundle),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(timing.how.device),
        "subject": subject,
        "batch": timing.how.max_batch,
        "proposals": timing.how.proposals,  # null: the bundle's
        "short_side": timing.how.short_side,
        "runs": timing.runs,
        "reference": names[0],
        **_measure(timing, opened, names, pictures),
    }
    print_timing(report, to_stderr=json_file == "-")
    if plot is not None:
        from comask.cli.bench_plots import draw_timing

        draw_timing(report, plot)
    if timing.record:
        _record(timing, report)
    write_json(json_file, report)


def _pictures(timing: Timing, manifest: Manifest) -> tuple[list[Pixels], str]:
    """The images to run, at most as many as there are places in all batches, and what they are."""
    import numpy as np

    from comask.preprocess import decode_image

    if timing.images is not None:
        pictures: list[Pixels] = []
        for file in find_files(str(timing.images), "image"):
            try:
                pictures.append(decode_image(file))
            except ImageError as error:
                click.echo(f"skipped: {one_line(error)}", err=True)
            if len(pictures) == timing.runs * timing.how.max_batch:
                break
        if not pictures:
            raise ImageError(f"--images {timing.images}: none of them can be read")
        return pictures, f"{len(pictures)} images of {timing.images}"
    height, width = manifest.preprocess.short_side, manifest.preprocess.max_side
    if timing.size is not None:
        parts = timing.size.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise click.UsageError(f"--size {timing.size}: expected HxW in pixels, as in 800x1333")
        height, width = map(int, parts)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return [noise], f"noise of {height}x{width}"


def _measure(
    timing: Timing, bundle: Bundle, names: Sequence[str], pictures: list[Pixels]
) -> dict[str, Any]:
    """The report's `canvases` and `backends`."""
    from comask.progress import Progress
    from comask.runtime.bench.memory import peak_memory
    from comask.runtime.bench.timing import (
        canvas_of,
        check_batch,
        full_batches,
        measure_stream,
        take_turns,
    )

    batch = timing.how.max_batch
    options = dataclasses.asdict(timing.how)
    memory: dict[str, PeakMemory] = {}
    with Progress("memory", len(names), unit="backends") as progress:
        for name in names:  # first, while this process holds nothing that they might lack
            preprocess = bundle.manifest.preprocess
            largest = _largest(pictures, preprocess)
            memory[name] = peak_memory(bundle.folder, name, largest, options)
            progress.advance()
            if memory[name].problem:
                click.echo(f"warning: memory of {name}: {memory[name].problem}", err=True)
    with contextlib.ExitStack() as stack:
        predictors = {
            name: stack.enter_context(Predictor.open(bundle.folder, name, timing.how))
            for name in names
        }
        for predictor in predictors.values():
            check_batch(predictor, batch)
        preprocess = predictors[names[0]].preprocess
        batches = full_batches(pictures, preprocess, batch)
        progress = stack.enter_context(Progress("measuring", timing.runs, unit="turns"))
        measured = take_turns(
            predictors, dict.fromkeys(names, batches),
            runs=timing.runs, warm_ups=timing.warm_ups, advance=progress.advance,
        )  # fmt: skip
        # the other backends take frames one at a time, as they were measured
        streams = {
            name: measure_stream(predictor, batches, runs=timing.runs)
            | {"gpu_bytes": memory[name].stream}
            for name, predictor in predictors.items()
            if predictor.stages.gpu is not None
        }
        stages = {name: predictor.stages for name, predictor in predictors.items()}
    reference = measured[names[0]]
    return {
        "canvases": sorted({canvas_of(image, preprocess) for image in pictures}),
        "backends": {
            name: {"runs_as": stages[name].backend, "device": stages[name].device}
            | _summary(measured[name], reference)
            | {
                "resident_bytes": memory[name].resident,
                "gpu_bytes": memory[name].gpu,
                "stream": streams.get(name),
            }
            for name in names
        },
    }


def _summary(measured: Measured, reference: Measured) -> dict[str, Any]:
    """One backend's figures; the ratio is of the medians, above 1 where it is faster."""
    import numpy as np

    from comask.runtime.bench.timing import SUM, percentiles

    seconds = {part: np.array(values) for part, values in measured.seconds.items()}
    outside = 1 - (seconds["stage1"] + seconds["stage2"]) / seconds[SUM]
    return {
        "milliseconds": {part: percentiles(values) for part, values in seconds.items()},
        "ratio": reference.median / measured.median,
        "images_per_second": measured.images_per_second,
        "outside_stages": float(np.median(outside)),
        "detections_per_image": measured.detections_per_image,
        "cores_busy": measured.cores,
        "warm_ups": measured.warm_ups,
    }


def _largest(images: list[Pixels], preprocess: PreprocessConfig) -> tuple[int, int]:
    """(h, w) of the image that takes the largest canvas."""
    from comask.runtime.bench.timing import canvas_of

    def area(image: Pixels) -> int:
        height, width = canvas_of(image, preprocess)
        return height * width

    height, width, _ = max(images, key=area).shape
    return height, width


def _record(timing: Timing, report: dict[str, Any]) -> None:
    """Puts the medians into the manifest, in place of older ones of that backend, device and batch."""
    from comask.bundle import Bundle, update_manifest

    manifest = Bundle.open(timing.bundle).manifest
    own = (manifest.model.proposals, manifest.preprocess.short_side)
    how = timing.how
    if (how.proposals or own[0], how.short_side or own[1]) != own:
        click.echo("not recorded in the bundle, as this is another setting than its own", err=True)
        return
    shared = {
        key: report[key] for key in ("when", "machine", "subject", "canvases", "batch", "runs")
    }
    measured = {}
    for found in report["backends"].values():
        key = f"{found['runs_as']} on {found['device']}, batch {report['batch']}"
        medians = {part: value["p50"] / 1000 for part, value in found["milliseconds"].items()}
        measured[key] = {"seconds": medians, "device": found["device"], **shared}

    def change(manifest: Manifest) -> Manifest:
        return dataclasses.replace(manifest, latency=(manifest.latency or {}) | measured)

    try:
        update_manifest(timing.bundle, change)
    except OSError as error:
        click.echo(f"warning: the result is not recorded in the bundle: {error}", err=True)
