"""How TensorRT's builder is asked to work, and which of it each flavor can do."""

from __future__ import annotations

from dataclasses import dataclass

from comask.errors import EngineError
from comask.export.aot_plugins import check_aot
from comask.runtime.gpu import Gpu
from comask.runtime.trt.flavors import Flavor

HARDWARE_COMPATIBILITY = ("ampere_plus", "same_compute_capability")
PLUGINS = ("python", "aot", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of the builder; None leaves TensorRT's default.

    Attributes:
        workspace_mib: most scratch memory of a layer.
        optimization_level: 0 (builds fast) to 5 (searches long).
        hardware_compatibility: one of `HARDWARE_COMPATIBILITY`, for plans that run on other GPUs than
            the one they are built on; TensorRT alone.
        version_compatible: the plan runs under later versions of TensorRT; TensorRT alone.
        compute_capabilities: 86 and the like, for which TensorRT-RTX prepares the plan; empty: all that
            it serves.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    hardware_compatibility: str | None = None
    version_compatible: bool = False
    compute_capabilities: tuple[int, ...] = ()


def check_options(flavor: Flavor, plugin: str, options: BuildOptions, gpu: Gpu | None) -> None:
    """Refuses what this flavor or machine cannot honour.

    Raises:
        EngineError: naming the option and what to do instead.
    """
    if plugin not in PLUGINS:
        raise EngineError(f"plugin {plugin!r}: expected one of {', '.join(PLUGINS)}")
    if plugin == "aot":
        check_aot(flavor)
    if flavor.name == "tensorrt":
        if gpu is None:
            raise EngineError(
                "tensorrt tunes its plans on a GPU and there is none here; build on the machine that "
                "will run them, or take --engine tensorrt-rtx, which builds anywhere"
            )
        if options.compute_capabilities:
            raise EngineError(
                "--compute-capability: is for tensorrt-rtx; tensorrt builds for the GPU at hand, or "
                "for more with --hardware-compatibility"
            )
    if flavor.name == "tensorrt-rtx":
        if options.hardware_compatibility:
            raise EngineError(
                "--hardware-compatibility: tensorrt-rtx compiles for the GPU when it loads a plan, so "
                "its plans fit all GPUs that it serves; leave the option out"
            )
        if options.version_compatible:
            raise EngineError(
                "--version-compatible: tensorrt-rtx has no lean runtime to go with such plans; leave "
                "the option out"
            )
