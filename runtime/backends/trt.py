"""The TensorRT backends: a bundle's engines that fit this machine, as `Stages`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from comask.bundle import Bundle
from comask.errors import BackendUnavailableError, EngineError
from comask.kernels import run
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.base import Array, Stages
from comask.runtime.device import Gpu, find_gpu_or_reason, open_device
from comask.runtime.trt.contexts import ContextPool
from comask.runtime.trt.engine import Engine, Flavor, load_flavor
from comask.runtime.trt.engine_folder import (
    PLANS,
    EngineFolder,
    find_engines,
    rebuild,
    rebuild_command,
)
from comask.runtime.trt.lane import TrtLanes
from comask.runtime.trt.ops import OPS, kernels_sha256
from comask.runtime.trt.plugins import register_plugins

# where several folders fit, by falling preference
PRECISIONS = ("int8", "fp16", "fp32")
PLUGINS = ("python", "aot", "none")
CALLS = 2  # at once: one call copies while another one computes


class TrtStage:
    """One stage alone: its inputs come from the host and its outputs go there.

    Args:
        pool: of both stages; whoever made it closes it.
        engine: of the stage.
    """

    def __init__(self, pool: ContextPool, engine: Engine) -> None:
        self._pool = pool
        self._stage = engine.stage
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Stage`."""
        wanted = {spec.name: feeds[spec.name] for spec in self.inputs}
        with self._pool.contexts() as contexts:
            return contexts.run((self._stage,), wanted)

    def close(self) -> None:
        """Nothing of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtStages(Stages):
    """Both stages on the GPU; between them nothing leaves it.

    Attributes:
        pool: of contexts.
    """

    pool: ContextPool

    def run(
        self, images: Array, image_sizes: Array, *, seconds: dict[str, float] | None = None
    ) -> dict[str, Array]:
        """See `Stages`."""
        with self.pool.contexts() as contexts:
            feeds = {"images": images, "image_sizes": image_sizes}
            return contexts.run(tuple(PLANS), feeds, seconds)

    @property
    def gpu(self) -> int:
        """See `Stages`."""
        return self.pool.device.index

    def lanes(self, count: int, *, graphs: bool) -> TrtLanes:
        """See `Stages`."""
        return TrtLanes(self.pool, count, graphs=graphs)

    def close(self) -> None:
        """Waits for running calls, then frees everything."""
        self.pool.close()


def open_backend(bundle: Bundle, name: str, precision: str | None, options: LoadOptions) -> Stages:
    """See `comask.runtime.backends.MODULES`; the engines that fit this machine, fastest first.

    Raises:
        BackendUnavailableError: when the bundle has no such engines, or GPU, pycuda or the flavor is
            missing.
        EngineError: when the engines do not fit and are not to be built again, or cannot be opened.
    """
    if options.device == "cpu":
        raise BackendUnavailableError(
            f"{name} runs on a GPU, and device cpu was asked for; onnxruntime and torch run there"
        )
    device = options.device or 0
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
    """The plans of one folder, which must be known to fit.

    Args:
        engines: that folder.
        device: index of the GPU.
        proposals: see `Stages`.

    Raises:
        BackendUnavailableError: when pycuda or the flavor is missing.
        EngineError: when a plan is altered, or TensorRT does not open it.
        KernelError: when the plugins' kernels cannot be compiled for the GPU.
    """
    opened, flavor, info = open_device(device), load_flavor(engines.info.flavor), engines.info
    with opened:
        if info.plugin == "python":
            register_plugins(flavor)
            for op in OPS:
                run.prepare(op.kernel)  # TensorRT would drop the reason of a failure
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
        proposals=proposals,
        device=f"cuda:{device}",
        pool=pool,
    )


def _engines(bundle: Bundle, flavor_name: str, precision: str | None) -> list[EngineFolder]:
    """The flavor's engines, fastest first.

    Raises:
        BackendUnavailableError: when there are none.
    """
    there = find_engines(bundle)
    found = [
        folder
        for folder in there
        if folder.info.flavor == flavor_name and precision in (None, folder.info.precision)
    ]
    if not found:
        kinds = sorted({f"{f.info.flavor}:{f.info.precision}" for f in there})
        kind = f"{flavor_name}:{precision}" if precision else flavor_name
        raise BackendUnavailableError(
            f"{bundle.folder}: holds no engines for {kind} (it has {', '.join(kinds) or 'none'}); "
            f"comask-export {bundle.folder} --engine {flavor_name} --precision {precision or 'fp16'} "
            f"builds them"
        )

    def rank(folder: EngineFolder) -> tuple[int, int]:
        info = folder.info
        return PRECISIONS.index(info.precision), PLUGINS.index(info.plugin)

    return sorted(found, key=rank)


def _first_fit(
    folders: list[EngineFolder], bundle: Bundle, flavor: Flavor, gpu: Gpu
) -> tuple[EngineFolder, list[str]]:
    """The first folder that may run here; else the first of all, and why it may not."""
    kernels = kernels_sha256()
    reasons = [folder.mismatches(bundle, flavor.version, gpu, kernels) for folder in folders]
    fitting = [folder for folder, found in zip(folders, reasons, strict=True) if not found]
    return (fitting[0], []) if fitting else (folders[0], reasons[0])
