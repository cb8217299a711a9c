"""`comask-export --engine`: from a bundle to engines of TensorRT or TensorRT-RTX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from comask.bundle import STAGES
from comask.cli.options import gathered
from comask.export.build_options import (
    HARDWARE_COMPATIBILITY,
    PLUGINS,
    BuildOptions,
    Profile,
    check_options,
)
from comask.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from comask.bundle import Bundle
    from comask.runtime.trt.engine_folder import EngineFolder

FLAVORS = ("tensorrt", "tensorrt-rtx", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the options of engines say.

    Attributes:
        engine: one of `FLAVORS`; `none` builds nothing.
        plugin: one of `PLUGINS`.
        profile: sizes as `NAME=MIN:BEST:MAX`, see `Profile.of`.
        rebuild: whether engines that are there are replaced.
        builder: what the builder is asked for.
    """

    engine: str = "none"
    plugin: str = "python"
    profile: tuple[str, ...] = ()
    rebuild: bool = False
    builder: BuildOptions = field(default_factory=BuildOptions)


def engine_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--engine` and what only it uses; they reach the command as `engines`: `EngineOptions`."""
    options = [
        click.option("--engine", type=click.Choice(FLAVORS), default="none",
                     metavar="tensorrt|tensorrt-rtx", help="Also build engines of each --precision."),
        click.option("--plugin", type=click.Choice(PLUGINS), default="python",
                     help="Our ops; none: standard layers. [python]"),
        click.option("--profile", multiple=True, metavar="NAME=MIN:BEST:MAX",
                     help="Sizes of batch, height, width or proposals."),
        click.option("--workspace", "workspace_mib", type=click.IntRange(1), metavar="MIB",
                     help="Most scratch memory a layer."),
        click.option("--optimization-level", type=click.IntRange(0, 5), metavar="0..5",
                     help="0 builds fast, 5 searches long."),
        click.option("--hardware-compatibility",
                     type=click.Choice(HARDWARE_COMPATIBILITY), metavar="LEVEL",
                     help="tensorrt: see docs/tensorrt.md."),
        click.option("--version-compatible", is_flag=True,
                     help="tensorrt: plans that later versions run."),
        click.option("--compute-capability", "compute_capabilities", type=click.IntRange(50),
                     multiple=True, metavar="86", help="tensorrt-rtx: these GPUs alone."),
        click.option("--rebuild", is_flag=True, help="Replace engines that are there already."),
    ]  # fmt: skip
    function = gathered("builder", BuildOptions)(gathered("building", EngineOptions)(function))
    for option in reversed(options):
        function = option(function)
    return function


def check_flavor(options: EngineOptions) -> None:
    """Refuses what cannot be built here whatever the bundle is.

    Raises:
        BackendUnavailableError: when the flavor is not installed.
        EngineError: for an option that it cannot honour.
    """
    from comask.runtime.device import find_gpu
    from comask.runtime.trt.engine import load_flavor

    check_options(load_flavor(options.engine), options.plugin, options.builder, find_gpu())


def build_bundle_engines(
    bundle: Bundle,
    options: EngineOptions,
    precisions: Sequence[str],
    images: Callable[[], list[NDArray[np.uint8]]],
    *,
    to_stderr: bool,
) -> tuple[Bundle, list[EngineFolder]]:
    """Builds the engines of each precision, and compares int8 with fp16 where a GPU runs both.

    Args:
        bundle: with graphs of the precisions.
        options: with a flavor that `check_flavor` lets pass.
        precisions: of the engines.
        images: called where finished engines can be compared with PyTorch; u8 [h, w, 3], RGB.

    Raises:
        ConfigError: for a profile that cannot be.
        PrecisionError: when int8 is not faster; its engines are gone then.
        ComaskError: when one cannot be built; those before it stay.
    """
    from comask.calib.speed import compare_speed

    report = functools.partial(click.echo, err=True)
    built = _build_with_progress(bundle, options, precisions, images, report)
    bundle = compare_speed(bundle, built, images, report)
    for folder in built:
        _print_engines(folder, to_stderr=to_stderr)
    return bundle, built


def _build_with_progress(
    bundle: Bundle,
    options: EngineOptions,
    precisions: Sequence[str],
    images: Callable[[], list[NDArray[np.uint8]]],
    report: Callable[[str], None],
) -> list[EngineFolder]:
    """The engines of each precision, with TensorRT's own progress on the terminal."""
    from comask.export.engine import EngineRequest, build_engines

    stages, folders = list(STAGES), []
    for precision in precisions:
        request = EngineRequest(
            flavor=options.engine,
            precision=precision,
            plugin=options.plugin,
            profile=Profile.of(bundle.manifest, options.profile),
            options=options.builder,
        )
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
                    rebuild=options.rebuild,
                    report=report,
                    progress=show,
                )
            )
    return folders


def _print_engines(engines: EngineFolder, *, to_stderr: bool) -> None:
    """What was built, and which layers have which precision."""
    from comask.runtime.trt.engine_folder import PLANS

    info = engines.info
    for stage, file in PLANS.items():
        layers = info.layers[stage]
        counts, where = layers.engine, "engine"
        if counts is None:
            counts, where = layers.network, "network"
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        size = (engines.folder / file).stat().st_size / 2**20
        click.echo(
            f"{engines.folder / file}: {size:.0f} MiB, built in {info.seconds[stage]:.1f} s; of "
            f"{layers.of} convolutions and products {kinds or 'none'}, read from the {where}",
            err=to_stderr,
        )
    proof = info.verification
    if "not_run" in proof:
        click.echo(f"warning: these engines were not run: {proof['not_run']}", err=True)
        return
    click.echo(
        f"{engines.folder}: agrees with {proof['reference']} on {proof['detections']} detections, "
        f"boxes within {proof['box']:.1e} px, scores within {proof['score']:.1e}, maps within "
        f"{max(proof['relative'].values()):.1e} relative",
        err=to_stderr,
    )
