"""The options of `comask-export` that concern TensorRT engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from comask.export.build_options import (
    HARDWARE_COMPATIBILITY,
    PLUGINS,
    BuildOptions,
    check_options,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from comask.bundle import Bundle
    from comask.export.engine import EngineRequest
    from comask.runtime.trt.engine_folder import EngineFolder

FLAVORS = ("tensorrt", "tensorrt-rtx", "none")


def engine_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--engine` and what only it uses; all arrive in one dictionary, `engine`."""
    options = [
        click.option("--engine", type=click.Choice(FLAVORS), default="none",
                     metavar="tensorrt|tensorrt-rtx", help="Also build engines of each --precision."),
        click.option("--plugin", type=click.Choice(PLUGINS), default="python",
                     help="Our ops; none: standard layers. [python]"),
        click.option("--profile", multiple=True, metavar="NAME=MIN:BEST:MAX",
                     help="Sizes of batch, height, width or proposals."),
        click.option("--workspace", type=click.IntRange(1), metavar="MIB",
                     help="Most scratch memory a layer."),
        click.option("--optimization-level", type=click.IntRange(0, 5), metavar="0..5",
                     help="0 builds fast, 5 searches long."),
        click.option("--hardware-compatibility",
                     type=click.Choice(HARDWARE_COMPATIBILITY), metavar="LEVEL",
                     help="tensorrt: see docs/tensorrt.md."),
        click.option("--version-compatible", is_flag=True,
                     help="tensorrt: plans that later versions run."),
        click.option("--compute-capability", type=click.IntRange(50), multiple=True, metavar="86",
                     help="tensorrt-rtx: these GPUs alone."),
        click.option("--rebuild", is_flag=True, help="Replace engines that are there already."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


ENGINE_PARAMETERS = (
    "engine", "plugin", "profile", "workspace", "optimization_level", "hardware_compatibility",
    "version_compatible", "compute_capability", "rebuild",
)  # fmt: skip


def check_usage(values: dict[str, Any]) -> None:
    """Refuses engine options without `--engine`.

    Raises:
        UsageError: naming the first.
    """
    if values["engine"] != "none":
        return
    context = click.get_current_context()
    for name in ENGINE_PARAMETERS[1:]:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{name.replace('_', '-')} needs --engine tensorrt or tensorrt-rtx"
            )


def check_flavor(values: dict[str, Any]) -> None:
    """Refuses what cannot be built here whatever the bundle is.

    Raises:
        BackendUnavailableError: when the flavor is not installed.
        EngineError: for an option that it cannot honour.
    """
    if values["engine"] == "none":
        return
    from comask.runtime.gpu import find_gpu
    from comask.runtime.trt.engine import load_flavor

    check_options(
        load_flavor(values["engine"]), values["plugin"], _build_options(values), find_gpu()
    )


def _build_options(values: dict[str, Any]) -> BuildOptions:
    return BuildOptions(
        workspace_mib=values["workspace"],
        optimization_level=values["optimization_level"],
        hardware_compatibility=values["hardware_compatibility"],
        version_compatible=values["version_compatible"],
        compute_capabilities=values["compute_capability"],
    )


def engine_request(values: dict[str, Any], bundle: Bundle, precision: str) -> EngineRequest:
    """What the options ask for.

    Raises:
        ConfigError: for a profile that cannot be.
    """
    from comask.export.build_options import Profile
    from comask.export.engine import EngineRequest

    return EngineRequest(
        flavor=values["engine"],
        precision=precision,
        plugin=values["plugin"],
        profile=Profile.of(bundle.manifest, values["profile"]),
        options=_build_options(values),
    )


def build_with_progress(
    bundle: Bundle,
    values: dict[str, Any],
    precisions: tuple[str, ...],
    images: Callable[[], list[NDArray[np.uint8]]],
) -> list[EngineFolder]:
    """Builds the engines of each precision, showing TensorRT's own progress.

    `images` are asked for where finished engines can be compared with PyTorch.

    Raises:
        ComaskError: when one cannot be built; those before it stay.
    """
    from comask.bundle import STAGES
    from comask.export.engine import build_engines
    from comask.progress import Progress

    stages, folders = list(STAGES), []
    for precision in precisions:
        request = engine_request(values, bundle, precision)
        with Progress(f"engines {precision}", 100 * len(stages), unit="%") as bar:
            done = 0

            def show(stage: str, phase: str, share: float, bar: Progress = bar) -> None:
                nonlocal done
                now = 100 * stages.index(stage) + round(100 * share)
                bar.advance(now - done, note=phase)
                done = now

            folders.append(
                build_engines(
                    bundle,
                    request,
                    images=images,
                    rebuild=values["rebuild"],
                    report=lambda line: click.echo(line, err=True),
                    progress=show,
                )
            )
    return folders
