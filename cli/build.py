"""`comask build`: from a bundle to engines of TensorRT or TensorRT-RTX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comask.bundle import PRECISIONS, STAGES, Bundle
from comask.cli.command import command, option
from comask.cli.export import add_missing, print_exported, report
from comask.cli.options import (
    check_outputs,
    gathered,
    json_option,
    precision_list,
    verification_images,
    verification_options,
    write_json,
)
from comask.export.build_options import (
    HARDWARE_COMPATIBILITY,
    PLUGINS,
    BuildOptions,
    Profile,
    check_options,
)
from comask.progress import Progress
from comask.runtime.backends import require_precision
from comask.runtime.gpu import find_gpu
from comask.runtime.trt.flavor import load_flavor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from comask.runtime.trt.engine_folder import EngineFolder

FLAVORS = ("tensorrt", "tensorrt-rtx")
BUILDER = "Builder"  # heading of options


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options of `comask build`.

    Attributes:
        engine: one of `FLAVORS`.
        plugin: one of `PLUGINS`.
        profile: sizes as `NAME=MIN:BEST:MAX`, see `Profile.of`.
        rebuild: whether engines that are there are replaced.
        builder: what the builder is asked for.
    """

    engine: str
    plugin: str
    profile: tuple[str, ...]
    rebuild: bool
    builder: BuildOptions


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--engine", type=click.Choice(FLAVORS), required=True, help="What builds and runs them.")
@option("--precision", "precisions", default="fp32", callback=precision_list(*PRECISIONS),
        metavar=",".join(PRECISIONS), help="Precisions, with engines for each. [fp32]")  # fmt: skip
@option("--plugin", type=click.Choice(PLUGINS), default="python",
        help="Form of comask's two operators; none: standard layers. [python]")  # fmt: skip
@option("--profile", multiple=True, metavar="NAME=N|MIN:BEST:MAX",
        help="Sizes of batch, height, width or proposals.")  # fmt: skip
@option("--rebuild", is_flag=True, help="Replace engines that exist already.")
@verification_options
@json_option
@option("--workspace", "workspace_mib", type=click.IntRange(1), metavar="MIB", group=BUILDER,
        help="Limit of scratch memory per layer.")  # fmt: skip
@option("--optimization-level", type=click.IntRange(0, 5), metavar="0..5", group=BUILDER,
        help="0 builds fast, 5 searches long.")  # fmt: skip
@option("--hardware-compatibility", type=click.Choice(HARDWARE_COMPATIBILITY), metavar="LEVEL",
        group=BUILDER,
        help=f"tensorrt: run on other GPUs: {', '.join(HARDWARE_COMPATIBILITY)}.")  # fmt: skip
@option("--version-compatible", is_flag=True, group=BUILDER,
        help="tensorrt: plans that later versions run.")  # fmt: skip
@option("--compute-capability", "compute_capabilities", type=click.IntRange(50), multiple=True,
        metavar="86", group=BUILDER, help="tensorrt-rtx: build for these GPUs only.")  # fmt: skip
@gathered("builder", BuildOptions)
@gathered("building", EngineOptions)
def main(
    bundle: Path,
    building: EngineOptions,
    precisions: tuple[str, ...],
    data: str,
    limit: int,
    json_file: str | None,
) -> None:
    """Build TensorRT engines for a bundle, and compare them with PyTorch where a GPU runs them.

    Missing fp32 and fp16 graphs are exported first. TensorRT-RTX builds without a GPU.

    \b
    comask build bundle --engine tensorrt-rtx --precision fp32,fp16
    comask build bundle --engine tensorrt --profile batch=1:8:16 --profile height=480:800:1344
    """
    check_outputs(json=json_file)
    to_stderr = json_file == "-"
    opened = Bundle.open(bundle)
    check_flavor(building)  # before minutes are spent on graphs
    if "int8" in precisions:
        require_precision(opened, "tensorrt", "int8")
    images = verification_images(data, limit)
    exported = add_missing(opened, precisions, images, quiet=True)
    print_exported(exported, to_stderr=to_stderr)
    changed, engines = build_bundle_engines(
        exported.bundle, building, precisions, images, to_stderr=to_stderr
    )
    # the manifest, and what each engine.json of this call holds, by its folder
    made = {str(folder.folder): dataclasses.asdict(folder.info) for folder in engines}
    write_json(json_file, dataclasses.asdict(changed.manifest) | {"engines": made})


def check_flavor(options: EngineOptions) -> None:
    """Checks that engines of this flavor can be built here, whatever the bundle is.

    Raises:
        BackendUnavailableError: when the flavor is not installed.
        EngineError: for an option that it cannot honour.
    """
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

    built = _build_with_progress(bundle, options, precisions, images)
    for folder in built:  # before a comparison that may refuse int8
        _print_engines(folder, to_stderr=to_stderr)
    bundle = compare_speed(bundle, built, images, report)
    return bundle, built


def _build_with_progress(
    bundle: Bundle,
    options: EngineOptions,
    precisions: Sequence[str],
    images: Callable[[], list[NDArray[np.uint8]]],
) -> list[EngineFolder]:
    """Builds the engines of each precision, with TensorRT's own progress on the terminal."""
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
    """Prints what was built, and which layers have which precision."""
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
