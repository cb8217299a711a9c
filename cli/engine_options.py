"""Options of `comask-export` that build engines, and those that make a Triton repository."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from comask.cli.options import write_json
from comask.export.build_options import (
    HARDWARE_COMPATIBILITY,
    PLUGINS,
    BuildOptions,
    check_options,
)
from comask.export.triton.repository import ServeRequest, write_repository

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from comask.bundle import Bundle
    from comask.export.engine import EngineRequest
    from comask.runtime.trt.engine_folder import EngineFolder

FLAVORS = ("tensorrt", "tensorrt-rtx", "none")

ENGINE_PARAMETERS = (
    "engine", "plugin", "profile", "workspace", "optimization_level", "hardware_compatibility",
    "version_compatible", "compute_capability", "rebuild",
)  # fmt: skip

SERVERS = ("triton",)
SERVE_PARAMETERS = ("serve", "backend", "engines", "model_name", "max_batch")
SHARED_PARAMETERS = ("source", "output", "json_file", "verbose")  # with or without --serve


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


def serve_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--serve` and what only it uses; they reach the command as `serve`, None where not wanted."""
    options = [
        click.option("--serve", type=click.Choice(SERVERS), metavar="triton",
                     help="Write BUNDLE into a model repository."),
        click.option("--backend", default="onnxruntime", metavar="NAME[:PRECISION]",
                     help="--serve: tensorrt, … [onnxruntime]"),
        click.option("--engines", metavar="NAME",
                     help="--serve: which of several engine folders."),
        click.option("--model-name", default="comask", metavar="NAME",
                     help="--serve: what clients ask for. [comask]"),
        click.option("--max-batch", type=click.IntRange(1), metavar="N",
                     help="--serve: images a request. [8]"),
    ]  # fmt: skip

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        _check_usage(arguments["serve"])
        taken = {name: arguments.pop(name) for name in SERVE_PARAMETERS}
        wanted = taken.pop("serve") is not None
        function(serve=ServeRequest(**taken) if wanted else None, **arguments)

    for option in reversed(options):
        run = option(run)
    return run


def _check_usage(serve: str | None) -> None:
    """Refuses options that `--serve` does not use, and those that need it.

    Raises:
        UsageError: naming the first.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is click.core.ParameterSource.DEFAULT or name in SHARED_PARAMETERS:
            continue
        if serve is None and name in SERVE_PARAMETERS:
            raise click.UsageError(f"{parameter.opts[0]} needs --serve")
        if serve is not None and name not in SERVE_PARAMETERS:
            raise click.UsageError(
                f"{parameter.opts[0]} changes a bundle, and --serve takes one as it is: run "
                f"comask-export twice"
            )


def serve_bundle(
    source: Path, output: Path | None, request: ServeRequest, json_file: str | None
) -> None:
    """Writes the repository, and says what its server needs.

    Raises:
        UsageError: there is no `--output`, or `source` is a checkpoint.
        ComaskError: see `write_repository`.
    """
    from comask.bundle import Bundle

    if source.is_file():
        raise click.UsageError(f"--serve takes a bundle, and {source} is a file: export it first")
    if output is None:
        raise click.UsageError("--output is missing: the model repository needs a folder")
    written = write_repository(Bundle.open(source), output, request)
    needs = "comask in the server's Python"
    if "tensorrt_version" in written:
        needs += f", TensorRT {written['tensorrt_version']}, {written['gpu']}"
    click.echo(
        f"{output}: {written['model']} on {written['backend']}, up to {written['max_batch_size']} "
        f"images at once; needs {needs}: see docs/serving.md",
        err=json_file == "-",
    )
    write_json(json_file, written)
