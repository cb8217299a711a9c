"""Builds a bundle's graphs into a folder of engines, once for each request."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from comask import __version__
from comask.bundle import STAGES, Bundle, graph_file, scratch_folder, sha256
from comask.errors import EngineError, UnsupportedGpuError
from comask.export.build_options import BuildOptions, Profile, check_options
from comask.export.engine_process import PlanRequest, build_in_process
from comask.export.layer_precision import asked_precisions, check_precisions
from comask.export.trt_functions import with_plugins, without_plugins
from comask.export.verify import prove_engines
from comask.files import locked
from comask.runtime.gpu import Gpu, find_gpu
from comask.runtime.trt.engine_folder import (
    DESCRIPTION,
    ENGINES,
    PLANS,
    TIMING_CACHE,
    EngineFolder,
    EngineInfo,
    leak_of,
    why_not_proved,
)
from comask.runtime.trt.flavor import Flavor, load_flavor
from comask.runtime.trt.memory_format import map_format
from comask.runtime.trt.ops import kernels_sha256

Images = Sequence[NDArray[np.uint8]]
Report = Callable[[str], None]
Progress = Callable[[str, str, float], None]  # stage, phase, finished share of the phase


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """A request to build engines.

    Attributes:
        flavor: `tensorrt` or `tensorrt-rtx`.
        precision: the precision of the bundle's graphs.
        plugin: `python`, `aot` or `none`.
        profile: the sizes that the engines support.
        options: the builder's options.
    """

    flavor: str
    precision: str
    plugin: str
    profile: Profile
    options: BuildOptions = field(default_factory=BuildOptions)


def build_engines(
    bundle: Bundle,
    request: EngineRequest,
    *,
    images: Callable[[], Images] | None = None,
    rebuild: bool = False,
    report: Report = lambda line: None,
    progress: Progress = lambda stage, phase, share: None,
) -> EngineFolder:
    """Builds both plans of a bundle in `BUNDLE/engines/…`; keeps existing ones that fit the request.

    Args:
        bundle: a bundle with graphs of the precision.
        request: the request.
        images: returns u8 [h, w, 3] RGB images. If a GPU here can run the finished plans, they are
            compared with PyTorch on these images. None for no comparison.
        rebuild: whether to replace engines that differ from the request or this machine.
        report: called with a line for each step.
        progress: called with the builder's progress.

    Raises:
        EngineError: TensorRT cannot build the plans, or existing ones differ and `rebuild` is false.
        BackendUnavailableError: the flavor is not installed.
        BundleError: a graph is missing or altered.
        ParityError: the plans do not compute the same as PyTorch.
    """
    flavor, gpu = load_flavor(request.flavor), find_gpu()
    check_options(flavor, request.plugin, request.options, gpu)
    info = _describe(bundle, request, flavor, gpu)
    if leak := leak_of(info):
        report(f"warning: {leak}")
    folder = bundle.folder / ENGINES / info.folder_name
    if folder.exists() and not rebuild:  # First of all, since it also works on a read-only disk.
        return _existing(folder, info, report)
    try:
        folder.parent.mkdir(exist_ok=True)
        lock = folder.parent / ".lock"
        lock.touch()
        said = f"{folder.parent}: another build is running; waiting for it"
        with locked(lock, waiting=lambda: report(said)):
            if folder.exists() and not rebuild:  # Another build has made it in the meantime.
                return _existing(folder, info, report)
            with scratch_folder(bundle.folder, folder.parent) as work:
                finished = _build_both(work, folder, bundle, info, report, progress)
                info = _proved(bundle, finished, images, gpu, report)
                text = json.dumps(dataclasses.asdict(info), indent=2) + "\n"
                (finished.folder / DESCRIPTION).write_text(text, encoding="utf-8")
                if folder.exists():
                    folder.rename(work / "replaced")
                finished.folder.rename(folder)
    except OSError as error:
        raise EngineError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return EngineFolder.open(folder)


def _build_both(
    work: Path, folder: Path, bundle: Bundle, info: EngineInfo, report: Report, progress: Progress
) -> EngineFolder:
    """Builds both stages into a folder in `work`; reuses the timing cache of `folder`, if it exists."""
    finished = work / "finished"
    finished.mkdir()
    if (folder / TIMING_CACHE).exists():
        shutil.copy(folder / TIMING_CACHE, finished)
    for stage in STAGES:
        report(f"building {stage} for {info.flavor} {info.version}, {info.precision}")
        step = functools.partial(progress, stage)
        info = _build_stage(bundle, info, stage, work, finished, report, step)
    return EngineFolder(finished, info)


def _proved(
    bundle: Bundle,
    engines: EngineFolder,
    images: Callable[[], Images] | None,
    gpu: Gpu | None,
    report: Report,
) -> EngineInfo:
    """Returns the engines' description with the result of their comparison with PyTorch."""
    reason = why_not_proved(engines.info, gpu) if images else "no images were given"
    if images is None or reason:
        return dataclasses.replace(engines.info, verification={"not_run": reason})
    report("comparing the engines with PyTorch")
    try:
        proof = prove_engines(bundle, engines, images())
    except UnsupportedGpuError as error:  # They may be right for other machines.
        proof = {"not_run": str(error)}
    return dataclasses.replace(engines.info, verification=proof)


def _describe(
    bundle: Bundle, request: EngineRequest, flavor: Flavor, gpu: Gpu | None
) -> EngineInfo:
    """Returns the content of `engine.json`, without the results of the build."""
    if request.flavor == "tensorrt-rtx":
        chosen = request.options.compute_capabilities
        target, tuned_on = "-".join(f"sm{c}" for c in chosen) or "portable", None
    else:
        assert gpu is not None
        target, tuned_on = f"sm{gpu.capability}", gpu.name
    transformed = {
        stage: _graph_for_tensorrt(bundle, stage, request.precision, request.plugin)
        for stage in STAGES
    }
    return EngineInfo(
        flavor=flavor.name,
        version=flavor.version,
        target=target,
        gpu=tuned_on,
        driver=gpu.driver if gpu else None,
        precision=request.precision,
        plugin=request.plugin,
        plugin_sha256=None if request.plugin == "none" else kernels_sha256(),
        profile=request.profile.ranges(),
        options=dataclasses.asdict(request.options),
        map_format=map_format(request.precision, request.plugin),
        # `_graph_for_tensorrt` has checked the files against these digests.
        graphs={s: bundle.manifest.files[graph_file(s, request.precision)] for s in STAGES},
        transformed={
            stage: hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
            for stage, model in transformed.items()
        },
        plans={},
        layers={},
        seconds={},
        verification={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        comask_version=__version__,
    )


def _existing(folder: Path, wanted: EngineInfo, report: Report) -> EngineFolder:
    """Returns the existing engines.

    Raises:
        EngineError: they differ from the request, or a plan is damaged.
    """
    existing = EngineFolder.open(folder)
    told_later = {
        "plans", "layers", "seconds", "verification", "created", "driver", "comask_version",
    }  # fmt: skip
    there, asked = _flat(existing.info), _flat(wanted)
    changed = [
        f"{name}: {there.get(name)} there, {asked.get(name)} requested"
        for name in sorted(there | asked)
        if name.partition(".")[0] not in told_later and there.get(name) != asked.get(name)
    ]
    if changed:
        raise EngineError(
            f"{folder}: differs from the request ({'; '.join(changed)}); give --rebuild to replace it"
        )
    for stage in PLANS:
        existing.plan(stage)
    report(f"{folder}: is there already")
    return existing


def _flat(info: EngineInfo) -> dict[str, Any]:
    """Returns all values by dotted names, as they are read back from JSON (tuples as lists)."""
    values = json.loads(json.dumps(dataclasses.asdict(info)))
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            {f"{name}.{key}": v for key, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def _graph_for_tensorrt(bundle: Bundle, stage: str, precision: str, plugin: str) -> onnx.ModelProto:
    model = onnx.load(bundle.graph(stage, precision))
    return without_plugins(model) if plugin == "none" else with_plugins(model)


def _build_stage(
    bundle: Bundle,
    info: EngineInfo,
    stage: str,
    work: Path,
    finished: Path,
    report: Report,
    progress: Callable[[str, float], None],
) -> EngineInfo:
    """Builds one plan into `finished`; returns `info` with the results of the build."""
    model = _graph_for_tensorrt(bundle, stage, info.precision, info.plugin)
    (work / "graph.onnx").write_bytes(model.SerializeToString())
    plan = finished / PLANS[stage]
    tuned_here = info.flavor == "tensorrt"  # TensorRT-RTX tunes a plan only when it is loaded.
    profile = Profile(**info.profile)
    # TensorRT-RTX compiles its kernels for the shapes that come, so it needs no second profile.
    profiles = profile.by_batch() if tuned_here else (profile,)
    inputs = bundle.manifest.graphs[stage]["inputs"]
    request = PlanRequest(
        flavor=info.flavor,
        plugin=info.plugin,
        graph=str(work / "graph.onnx"),
        plan=str(plan),
        profiles=tuple(profile.shapes(inputs) for profile in profiles),
        options=BuildOptions(**info.options),
        map_format=info.map_format,
        timing_cache=str(finished / TIMING_CACHE) if tuned_here else None,
        tuned_here=tuned_here,
    )
    built = build_in_process(request, work, progress)
    layers = check_precisions(asked_precisions(model), built.network, built.engine)
    for name, precision in layers.differing.items():
        report(f"warning: {stage}: the engine seems to run {name} in {precision}")
    return dataclasses.replace(
        info,
        plans=info.plans | {stage: sha256(plan)},
        layers=info.layers | {stage: layers},
        seconds=info.seconds | {stage: round(built.seconds, 3)},
    )
