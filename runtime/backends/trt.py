"""The TensorRT backends: open a bundle's engines that fit this machine as `Stages`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from typing_extensions import override

from comask.bundle import Bundle
from comask.errors import BackendUnavailableError, EngineError
from comask.kernels import run
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.base import Array, Stages
from comask.runtime.backends.names import nvidia_device
from comask.runtime.device import open_device
from comask.runtime.gpu import Gpu, find_gpu_or_reason
from comask.runtime.trt.context_pool import ContextPool
from comask.runtime.trt.engine import Engine
from comask.runtime.trt.engine_folder import (
    PLANS,
    EngineFolder,
    find_engines,
    leak_of,
    rebuild,
    rebuild_command,
)
from comask.runtime.trt.flavor import Flavor, load_flavor
from comask.runtime.trt.lane import TrtLanes
from comask.runtime.trt.ops import OPS, kernels_sha256
from comask.runtime.trt.plugins import register_plugins

# of several folders that fit, the first of these is preferred
PRECISIONS = ("int8", "fp16", "fp32")
PLUGINS = ("python", "aot", "none")
CALLS = 2  # calls that may run at once: one copies while the other computes

logger = logging.getLogger(__name__)


class TrtStage:
    """One stage on its own, which reads its inputs from the host and returns its outputs there.

    Args:
        pool: the contexts of both stages; its creator closes it.
        engine: the stage's engine.
    """

    def __init__(self, pool: ContextPool, engine: Engine) -> None:
        self._pool = pool
        self._stage = engine.stage
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def run(self, feeds: Mapping[str, Array], keep: Collection[str] = ()) -> dict[str, Array]:
        """Runs the stage on the GPU and returns all outputs by name, on the host."""
        wanted = {spec.name: feeds[spec.name] for spec in self.inputs}
        with self._pool.contexts() as contexts:
            return contexts.run((self._stage,), wanted)

    def close(self) -> None:
        """Does nothing, since the pool owns all resources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtStages(Stages):
    """Both stages on the GPU, where stage 1's outputs stay for stage 2.

    Attributes:
        pool: the execution contexts.
    """

    pool: ContextPool

    @override
    def run(
        self,
        images: Array,
        image_sizes: Array,
        *,
        seconds: dict[str, float] | None = None,
        keep: Collection[str] = (),
    ) -> dict[str, Array]:
        with self.pool.contexts() as contexts:
            feeds = {"images": images, "image_sizes": image_sizes}
            return contexts.run(tuple(PLANS), feeds, seconds)

    @property
    @override
    def gpu(self) -> int:
        return self.pool.device.index

    @override
    def lanes(self, count: int, *, graphs: bool) -> TrtLanes:
        return TrtLanes(self.pool, count, graphs=graphs)

    @override
    def close(self) -> None:
        """Waits for running calls, then frees everything."""
        self.pool.close()


def open_backend(bundle: Bundle, name: str, precision: str | None, options: LoadOptions) -> Stages:
    """Opens the fastest engines that fit this machine; see `comask.runtime.backends.names.BACKENDS`.

    Raises:
        BackendUnavailableError: if the bundle has no such engines, or the GPU, pycuda or the flavor is
            missing.
        EngineError: if no engines fit and `on_mismatch` is `error`, or they cannot be opened.
    """
    device = nvidia_device(name, options.device)
    if device == "cpu":
        raise BackendUnavailableError(
            f"{name} runs on a GPU, and device cpu was asked for; onnxruntime and torch run on the CPU"
        )
    device = device or 0
    folders = _engines(bundle, name, precision)
    gpu, reason = find_gpu_or_reason(device)
    if gpu is None:
        raise BackendUnavailableError(
            f"{name} needs a GPU: {reason}; the onnxruntime and torch backends need none"
        )
    flavor = load_flavor(name)
    folder, mismatches = _first_fit(folders, bundle, flavor, gpu)
    if mismatches and options.on_mismatch == "rebuild":
        rebuild(folder, device)
        folders = _engines(bundle, name, folder.info.precision)
        folder, mismatches = _first_fit(folders, bundle, flavor, gpu)
    if mismatches:
        raise EngineError(
            f"{folder.folder}: {'; '.join(mismatches)}; build it again: {rebuild_command(folder)}"
        )
    return open_engines(folder, device=device, proposals=options.proposals)


def open_engines(engines: EngineFolder, *, device: int, proposals: int | None = None) -> TrtStages:
    """Opens the plans of one folder without checking whether they fit this machine.

    Args:
        engines: the folder.
        device: index of the GPU.
        proposals: see `Stages`.

    Raises:
        BackendUnavailableError: if pycuda or the flavor is missing.
        EngineError: if a plan was altered, or TensorRT cannot open it.
        KernelError: if the plugins' kernels cannot be compiled for the GPU.
    """
    opened, flavor, info = open_device(device), load_flavor(engines.info.flavor), engines.info
    if leak := leak_of(info):
        logger.warning("%s: %s", engines.folder, leak)
    with opened:
        if info.plugin == "python":
            register_plugins(flavor)
            for op in OPS:
                run.prepare(op.kernel)  # compiled here, since TensorRT would drop an error's reason
        runtime = flavor.trt.Runtime(flavor.log)
        if info.options.get("version_compatible"):
            runtime.engine_host_code_allowed = True  # the plan holds a lean runtime
        stages = {stage: Engine(flavor, runtime, engines, stage) for stage in PLANS}
    pool = ContextPool(opened, flavor, runtime, stages, CALLS, proposals)
    return TrtStages(
        backend=f"{info.flavor}:{info.precision}",
        stage1=TrtStage(pool, stages["stage1"]),
        stage2=TrtStage(pool, stages["stage2"]),
        largest_batch=min(engine.largest_batch for engine in stages.values()),
        device=f"cuda:{device}",
        pool=pool,
    )


def _engines(bundle: Bundle, flavor_name: str, precision: str | None) -> list[EngineFolder]:
    """Returns the flavor's engines, fastest first.

    Raises:
        BackendUnavailableError: if the bundle has none.
    """
    existing = find_engines(bundle)
    matching = [
        folder
        for folder in existing
        if folder.info.flavor == flavor_name and precision in (None, folder.info.precision)
    ]
    if not matching:
        kinds = sorted({f"{f.info.flavor}:{f.info.precision}" for f in existing})
        kind = f"{flavor_name}:{precision}" if precision else flavor_name
        raise BackendUnavailableError(
            f"{bundle.folder}: holds no engines for {kind} (it has {', '.join(kinds) or 'none'}); "
            f"comask build {bundle.folder} --engine {flavor_name} --precision {precision or 'fp16'} "
            f"builds them"
        )

    def rank(folder: EngineFolder) -> tuple[int, int]:
        info = folder.info
        return PRECISIONS.index(info.precision), PLUGINS.index(info.plugin)

    return sorted(matching, key=rank)


def _first_fit(
    folders: list[EngineFolder], bundle: Bundle, flavor: Flavor, gpu: Gpu
) -> tuple[EngineFolder, list[str]]:
    """Returns the first folder that may run here, or else the first one and why it may not."""
    kernels = kernels_sha256()
    reasons = [folder.mismatches(bundle, flavor.version, gpu, kernels) for folder in folders]
    for folder, mismatches in zip(folders, reasons, strict=True):
        if not mismatches:
            return folder, []
    return folders[0], reasons[0]
