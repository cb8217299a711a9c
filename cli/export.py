"""`comask-export`: from a checkpoint to a bundle, and what an existing bundle still lacks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from comask.bundle import BEST, INT8_BASE, MANIFEST, PRECISIONS, Bundle
from comask.calib.options import QuantizeOptions
from comask.cli.build import EngineOptions, build_bundle_engines, check_flavor, engine_options
from comask.cli.options import command, json_option, write_json
from comask.cli.quantize import quantize_bundle, quantize_options
from comask.cli.serve import serve_bundle, serve_options
from comask.errors import ComaskError
from comask.export.build_options import BuildOptions
from comask.export.triton.repository import ServeRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from comask.export.fp16 import Fp16Report
    from comask.export.pipeline import Exported, GraphReport
    from comask.runtime.trt.engine_folder import EngineFolder

    Images = Callable[[], list[NDArray[np.uint8]]]

VERIFY_SEED = 2_000_000  # other images than training and validation see


def _parameters(*kinds: type) -> set[str]:
    """The parameters whose values are the fields of these dataclasses."""
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


# the parameters that one job alone uses, besides the option that asks for it
CHECKPOINT = {"output", "score_threshold", "diagnostics"}
INT8 = _parameters(QuantizeOptions)
ENGINE = _parameters(EngineOptions, BuildOptions) - {"engine"}
SERVE = _parameters(ServeRequest)
WITH_SERVE = SERVE | {"source", "output", "serve", "json_file", "verbose"}


def precision_list(
    context: click.Context, parameter: click.Parameter, value: str
) -> tuple[str, ...]:
    """`fp16,fp32` → the precisions in the order of `PRECISIONS`."""
    wanted = {name.strip() for name in value.split(",")}
    if unknown := sorted(wanted.difference(PRECISIONS)):
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PRECISIONS)}")
    return tuple(name for name in PRECISIONS if name in wanted)


@command
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="The bundle's folder.")
@click.option("--precision", "precisions", default="fp32",
              callback=precision_list, metavar=",".join(PRECISIONS),
              help="Of the graphs; fp32 is always there.")  # fmt: skip
@click.option("--score-threshold", type=click.FloatRange(0, 1, max_open=True), metavar="P",
              help="Drop those up to it. [the model's]")  # fmt: skip
@click.option("--val-data", default="shapes", metavar="DIR|shapes",
              help="To compare graphs with PyTorch on. [shapes]")  # fmt: skip
@click.option("--verify-images", type=click.IntRange(1), default=3, metavar="N",
              help="How many of its images. [3]")  # fmt: skip
@click.option("--diagnostics", is_flag=True, help="Also output what the second stage starts from.")
@quantize_options
@engine_options
@serve_options
@json_option
def main(
    source: Path,
    output: Path | None,
    precisions: tuple[str, ...],
    score_threshold: float | None,
    val_data: str,
    verify_images: int,
    diagnostics: bool,
    int8: QuantizeOptions,
    building: EngineOptions,
    serve: str | None,
    serving: ServeRequest,
    json_file: str | None,
) -> None:
    """Export CHECKPOINT to a bundle that equals PyTorch, or add precisions and engines to BUNDLE.

    \b
    comask-export runs/shapes/checkpoint-best.pt --output bundle --precision fp32,fp16
    comask-export bundle --precision int8 --calib-data photos --val-data coco --ap-budget 0.3
    comask-export bundle --serve triton --output repository
    """
    to_stderr, builds = json_file == "-", building.engine != "none"
    in_place, given = (source / MANIFEST).exists(), _given()
    for parameter, option in given.items():
        if reason := _why_unused(parameter, precisions, serve is not None, builds, in_place):
            raise click.UsageError(f"{option} {reason}")
    if not source.exists():
        raise ComaskError(f"{source}: there is no such checkpoint or bundle")
    if serve:
        served = serve_bundle(source, output, serving, to_stderr=to_stderr)
        write_json(json_file, served.to_dict())
        return
    bundle = _open(source) if source.is_dir() else None
    quantizes = "int8" in precisions and _needs_int8(bundle, given, int8)
    if builds:
        check_flavor(building)  # not only after the export
    graphs = tuple(dict.fromkeys(INT8_BASE if p == "int8" and quantizes else p for p in precisions))
    images = functools.cache(lambda: _images(val_data, verify_images))
    if bundle:
        bundle, reports = _add_missing(bundle, graphs, images)
    elif output is None:
        raise click.UsageError(
            f"--output is missing: {source} is a file, so a checkpoint, and its bundle needs a folder"
        )
    else:
        bundle, reports = _export(
            source, output, graphs, images,
            score_threshold=score_threshold, diagnostics=diagnostics,
        )  # fmt: skip
    for precision, made in reports.items():
        _print_graphs(bundle.folder, precision, made, to_stderr=to_stderr)
    if quantizes:
        bundle = quantize_bundle(bundle, int8, val_data, to_stderr=to_stderr)
    engines: list[EngineFolder] = []
    if builds:
        bundle, engines = build_bundle_engines(
            bundle, building, precisions, images, to_stderr=to_stderr
        )
    if json_file:
        write_json(json_file, _as_json(bundle, engines))


def _given() -> dict[str, str]:
    """Parameters on the command line, and the option of each."""
    context = click.get_current_context()
    return {
        str(parameter.name): parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name))
        is not click.core.ParameterSource.DEFAULT
    }


def _why_unused(
    parameter: str, precisions: Collection[str], serves: bool, builds: bool, in_place: bool
) -> str:
    """Why a parameter changes nothing in this call, as the rest of a sentence; empty where it does."""
    if serves and parameter not in WITH_SERVE:
        return "changes a bundle, and --serve takes one as it is: run comask-export twice"
    if not serves and parameter in SERVE:
        return "needs --serve"
    if not builds and parameter in ENGINE:
        return "needs --engine tensorrt or tensorrt-rtx"
    if "int8" not in precisions and parameter in INT8:
        return "is for --precision int8"
    if in_place and not serves and parameter in CHECKPOINT:
        return "is for checkpoints; an existing bundle is changed in place"
    return ""


def _needs_int8(bundle: Bundle | None, given: Collection[str], int8: QuantizeOptions) -> bool:
    """Whether int8 graphs are to be made: there are none, or options ask for others.

    Raises:
        UsageError: they are, and there are no images to calibrate with.
    """
    if bundle and "int8" in bundle.manifest.precisions and INT8.isdisjoint(given):
        return False
    if int8.calib_data is None:
        raise click.UsageError(
            "--precision int8 needs --calib-data: a folder of images like those that the network "
            "will see, which nothing else can stand for"
        )
    return True


def _as_json(bundle: Bundle, engines: list[EngineFolder]) -> dict[str, Any]:
    """The manifest, and `engines`: what each `engine.json` of this call holds, by its folder."""
    found = {str(folder.folder): dataclasses.asdict(folder.info) for folder in engines}
    return dataclasses.asdict(bundle.manifest) | {"engines": found}


def _open(folder: Path) -> Bundle:
    """A folder's bundle.

    Raises:
        ComaskError: when it is no bundle.
    """
    if (folder / MANIFEST).exists():
        return Bundle.open(folder)
    if (folder / BEST).is_file():
        raise ComaskError(f"{folder} is a training run: give {folder / BEST}")
    raise ComaskError(f"{folder}: neither a checkpoint nor a bundle (no {MANIFEST})")


def _export(
    checkpoint: Path,
    output: Path,
    precisions: tuple[str, ...],
    images: Images,
    *,
    score_threshold: float | None,
    diagnostics: bool,
) -> Exported:
    from comask.export.pipeline import export_bundle
    from comask.training.checkpoint import load_checkpoint

    return export_bundle(
        load_checkpoint(checkpoint),
        checkpoint,
        output,
        images(),
        precisions=tuple(dict.fromkeys(("fp32", *precisions))),
        score_threshold=score_threshold,
        diagnostics=diagnostics,
        report=_report,
    )


def _add_missing(bundle: Bundle, precisions: tuple[str, ...], images: Images) -> Exported:
    """The bundle with the graphs of all `precisions`, and reports on those that it lacked."""
    from comask.export.pipeline import Exported, add_precisions

    there = bundle.manifest.precisions
    missing = tuple(name for name in precisions if name not in there)
    if kept := [name for name in precisions if name in there]:
        _report(f"{bundle.folder}: holds {', '.join(kept)} graphs already; they stay as they are")
    if not missing:
        return Exported(bundle, {})
    return add_precisions(bundle, missing, images(), report=_report)


def _report(line: str) -> None:
    click.echo(line, err=True)


def _print_graphs(folder: Path, precision: str, made: GraphReport, *, to_stderr: bool) -> None:
    """How far the graphs of one precision are off PyTorch."""
    worst = made.verification.worst
    click.echo(
        f"{folder}: {precision} graphs agree with PyTorch on {made.images} images: "
        f"{worst.detections} detections, boxes within {worst.box:.1e} px, scores within "
        f"{worst.score:.1e}, mask pixels within {worst.mask:.1e}, maps within "
        f"{max(worst.relative.values()):.1e} relative",
        err=to_stderr,
    )
    if worst.contested_proposals or worst.contested_detections:
        untrained = ": more than of a trained network, whose scores differ"
        click.echo(
            f"  of {worst.proposals} proposals {worst.contested_proposals}, and "
            f"{worst.contested_detections} detections, have no partner but near-ties"
            + (untrained if worst.degenerate else ""),
            err=to_stderr,
        )
    if made.fp16:
        _print_range(made.fp16, to_stderr=to_stderr)
    if not worst.detections:
        _report(
            "warning: PyTorch found nothing in these images, so no detection was compared; name "
            "better ones by --val-data, or lower --score-threshold"
        )


def _print_range(fp16: Fp16Report, *, to_stderr: bool) -> None:
    """What fp16 could not hold, and how much it could hold beyond the largest value that it holds."""
    from comask.export.fp16 import FP16_END

    for module, extreme in fp16.islands.items():
        click.echo(f"  kept in fp32: {module}, since {extreme}", err=to_stderr)
    found = fp16.largest
    place = "" if found.image is None else f" on image {found.image}"
    click.echo(
        f"  the largest value in fp16 is {found.largest:.2e} ({found.kind} of {found.module}{place}), "
        f"1/{FP16_END / found.largest:.0f} of what it holds",
        err=to_stderr,
    )


def _images(data: str, count: int) -> list[NDArray[np.uint8]]:
    from comask.data.open_data import open_source
    from comask.data.source import readable_images

    source = open_source(data, "val", shapes_images=4 * count, shapes_seed=VERIFY_SEED)
    # those with most objects: an empty image proves little
    busiest = sorted(range(len(source)), key=lambda i: -len(source.annotations(i)))
    images = [pixels for _, pixels in islice(readable_images(source, busiest), count)]
    if not images:
        raise ComaskError(f"--val-data {data}: holds no images")
    return images
