"""`comask export`: from a checkpoint to a bundle, and graphs that an existing bundle lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from comask.bundle import BEST, MANIFEST, Bundle
from comask.cli.command import command, option
from comask.cli.options import (
    check_outputs,
    json_option,
    precision_list,
    verification_images,
    verification_options,
    write_json,
)
from comask.errors import ComaskError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from comask.export.fp16 import Fp16Report
    from comask.export.pipeline import Exported, GraphReport

    Images = Callable[[], list[NDArray[np.uint8]]]

PRECISIONS = ("fp32", "fp16")  # int8 is made by `comask quantize`
FOR_CHECKPOINTS = {"output", "score_threshold", "settings", "diagnostics"}  # parameters
MOVED = {
    **dict.fromkeys(("--engine", "--plugin", "--profile", "--rebuild"), "comask build"),
    **dict.fromkeys(("--calib-data", "--calib-images", "--ap-budget"), "comask quantize"),
    **dict.fromkeys(("--serve", "--model-name"), "comask serve"),
}


@command(moved=MOVED)
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=click.Path(path_type=Path))
@option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the new bundle."
)
@option("--precision", "precisions", default="fp32", callback=precision_list(*PRECISIONS),
        metavar=",".join(PRECISIONS), help="Precisions of the graphs; fp32 is always made.")  # fmt: skip
@option("--score-threshold", type=click.FloatRange(0, 1, max_open=True), metavar="P",
        help="Drop detections with scores up to P. [the model's]")  # fmt: skip
@option("--set", "settings", multiple=True, metavar="KEY=VALUE",
        help="Change a setting that needs no training, e.g. model.agreement_score=true.")  # fmt: skip
@option("--diagnostics", is_flag=True, help="Also output the proposals' boxes and coarse masks.")
@verification_options
@json_option
def main(
    source: Path,
    output: Path | None,
    precisions: tuple[str, ...],
    score_threshold: float | None,
    settings: tuple[str, ...],
    diagnostics: bool,
    data: str,
    limit: int,
    json_file: str | None,
) -> None:
    """Export a checkpoint to a bundle whose graphs equal PyTorch; or add a precision to a bundle.

    The graphs are compared with PyTorch on real images first. A bundle that differs is not written.

    \b
    comask export runs/shapes/checkpoint-best.pt --output bundle --precision fp32,fp16
    comask export bundle --precision fp16
    """
    check_outputs(made=output, json=json_file)
    images = verification_images(data, limit)
    if not source.exists():
        raise ComaskError(f"{source}: there is no such checkpoint or bundle")
    if source.is_dir():
        if not (source / MANIFEST).exists():
            if (source / BEST).is_file():
                raise ComaskError(f"{source} is a training run: give {source / BEST}")
            raise ComaskError(f"{source}: neither a checkpoint nor a bundle (no {MANIFEST})")
        bundle = Bundle.open(source)
        context = click.get_current_context()
        for parameter in context.command.params:
            name = str(parameter.name)
            given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
            if name in FOR_CHECKPOINTS and given:
                raise click.UsageError(
                    f"{parameter.opts[0]} is for checkpoints; an existing bundle is changed in place"
                )
        exported = add_missing(bundle, precisions, images)
    elif output is None:
        raise click.UsageError(
            f"--output is missing: {source} is a file, so a checkpoint, and its bundle needs a folder"
        )
    else:
        threshold = () if score_threshold is None else (f"model.score_threshold={score_threshold}",)
        exported = _export(
            source, output, precisions, images,
            settings=settings + threshold, diagnostics=diagnostics,
        )  # fmt: skip
    print_exported(exported, to_stderr=json_file == "-")
    write_json(json_file, dataclasses.asdict(exported.bundle.manifest))


def _export(
    checkpoint: Path,
    output: Path,
    precisions: tuple[str, ...],
    images: Images,
    *,
    settings: tuple[str, ...],
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
        settings=settings,
        diagnostics=diagnostics,
        report=report,
    )


def add_missing(
    bundle: Bundle, precisions: tuple[str, ...], images: Images, *, quiet: bool = False
) -> Exported:
    """Returns the bundle with the graphs of all `precisions`, and reports on those that it lacked.

    Args:
        bundle: to extend.
        precisions: that it is to hold.
        images: gives the images that new graphs are compared on.
        quiet: say nothing of graphs that the bundle holds already.
    """
    from comask.export.pipeline import Exported, add_precisions

    there = bundle.manifest.precisions
    missing = tuple(name for name in precisions if name not in there)
    kept = [name for name in precisions if name in there]
    if kept and not quiet:
        report(f"{bundle.folder}: holds {', '.join(kept)} graphs already; they stay as they are")
    if not missing:
        return Exported(bundle, {})
    return add_precisions(bundle, missing, images(), report=report)


def print_exported(exported: Exported, *, to_stderr: bool) -> None:
    """Prints how far the new graphs are off PyTorch."""
    for precision, made in exported.reports.items():
        _print_graphs(exported.bundle.folder, precision, made, to_stderr=to_stderr)


def report(line: str) -> None:
    """Prints a line on standard error."""
    click.echo(line, err=True)


def _print_graphs(folder: Path, precision: str, made: GraphReport, *, to_stderr: bool) -> None:
    """Prints how far the graphs of one precision are off PyTorch."""
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
        report(
            "warning: PyTorch found nothing in these images, so no detection was compared; name "
            "better ones by --data, or lower --score-threshold"
        )


def _print_range(fp16: Fp16Report, *, to_stderr: bool) -> None:
    """Prints what fp16 cannot hold, and how far its largest value is from fp16's limit."""
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
