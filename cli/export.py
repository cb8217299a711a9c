"""`comask-export`: from a checkpoint to a bundle, and what an existing bundle still lacks."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from comask.bundle import BEST, INT8_BASE, MANIFEST, PRECISIONS
from comask.cli.engine_options import (
    build_with_progress,
    check_flavor,
    check_usage,
    engine_options,
    serve_bundle,
    serve_options,
)
from comask.cli.int8_options import (
    Int8Options,
    add_int8_graphs,
    int8_options,
    judge_speed,
    print_int8,
)
from comask.cli.options import command, json_option, write_json
from comask.errors import ComaskError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from comask.bundle import Bundle
    from comask.export.triton.repository import ServeRequest
    from comask.runtime.trt.engine_folder import EngineFolder

VERIFY_SEED = 2_000_000  # other images than training and validation see


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
@int8_options
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
    int8: Int8Options,
    serve: ServeRequest | None,
    json_file: str | None,
    **engine_values: Any,
) -> None:
    """Export CHECKPOINT to a bundle that equals PyTorch, or add precisions and engines to BUNDLE.

    \b
    comask-export runs/shapes/checkpoint-best.pt --output bundle --precision fp32,fp16
    comask-export bundle --precision int8 --calib-data photos --val-data coco --ap-budget 0.3
    comask-export bundle --serve triton --output repository
    """
    check_usage(engine_values)
    if not source.exists():
        raise ComaskError(f"{source}: there is no such checkpoint or bundle")
    if serve:
        serve_bundle(source, output, serve, json_file)
        return
    if source.is_dir():
        _refuse_other_folders(source)
    wanted = int8.wanted(precisions, source)
    check_flavor(engine_values)  # not only after the export
    exported = tuple(dict.fromkeys(INT8_BASE if p == "int8" and wanted else p for p in precisions))
    if source.is_dir():
        _refuse_in_place(output=output, score_threshold=score_threshold, diagnostics=diagnostics)
        bundle, added = _extend(source, exported, val_data, verify_images)
    elif output is None:
        raise click.UsageError(
            f"--output is missing: {source} is a file, so a checkpoint, and its bundle needs a folder"
        )
    else:
        bundle = _export(
            source, output, exported, val_data, verify_images,
            score_threshold=score_threshold, diagnostics=diagnostics,
        )  # fmt: skip
        added = bundle.manifest.precisions
    for precision in added:
        _print_proof(bundle, precision, to_stderr=json_file == "-")
    if wanted:
        bundle = add_int8_graphs(bundle, int8, val_data, _report)
        print_int8(bundle, to_stderr=json_file == "-")
    engines = []
    if engine_values["engine"] != "none":
        engines = build_with_progress(
            bundle, engine_values, precisions, lambda: _images(val_data, verify_images)
        )
        bundle = judge_speed(bundle, engines, lambda: _images(val_data, verify_images))
    for folder in engines:
        _print_engines(folder, to_stderr=json_file == "-")
    if json_file:
        write_json(json_file, _as_json(bundle, engines))


def _as_json(bundle: Bundle, engines: list[EngineFolder]) -> dict[str, Any]:
    """The manifest, and `engines`: what each `engine.json` of this call holds, by its folder."""
    import dataclasses
    import json

    found = {str(folder.folder): dataclasses.asdict(folder.info) for folder in engines}
    content: dict[str, Any] = json.loads(bundle.manifest.to_json())
    return content | {"engines": found}


def _refuse_other_folders(folder: Path) -> None:
    """Raises ComaskError where a folder is no bundle."""
    if (folder / MANIFEST).exists():
        return
    if (folder / BEST).is_file():
        raise ComaskError(f"{folder} is a training run: give {folder / BEST}")
    raise ComaskError(f"{folder}: neither a checkpoint nor a bundle (no {MANIFEST})")


def _refuse_in_place(**options: Any) -> None:
    """A bundle has decided these already.

    Raises:
        UsageError: naming the first that was given.
    """
    for name, value in options.items():
        if value is not None and value is not False:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for checkpoints; an existing bundle is changed in place"
            )


def _export(
    checkpoint: Path,
    output: Path,
    precisions: tuple[str, ...],
    data: str,
    count: int,
    **options: Any,
) -> Bundle:
    from comask.export.pipeline import export_bundle
    from comask.training.checkpoint import load_checkpoint

    return export_bundle(
        load_checkpoint(checkpoint),
        checkpoint,
        output,
        _images(data, count),
        precisions=tuple(dict.fromkeys(("fp32", *precisions))),
        report=_report,
        **options,
    )


def _extend(
    folder: Path, precisions: tuple[str, ...], data: str, count: int
) -> tuple[Bundle, tuple[str, ...]]:
    """The bundle with its new graphs, and which precisions those are of."""
    from comask.bundle import Bundle

    bundle = Bundle.open(folder)
    there = bundle.manifest.precisions
    missing = tuple(name for name in precisions if name not in there)
    if kept := [name for name in precisions if name in there]:
        _report(f"{folder}: holds {', '.join(kept)} graphs already; they stay as they are")
    if missing:
        from comask.export.pipeline import add_precisions

        bundle = add_precisions(bundle, missing, _images(data, count), report=_report)
    return bundle, missing


def _report(line: str) -> None:
    click.echo(line, err=True)


def _print_proof(bundle: Bundle, precision: str, *, to_stderr: bool) -> None:
    """How far the graphs of one precision are off PyTorch."""
    proof = bundle.manifest.verification[precision]
    click.echo(
        f"{bundle.folder}: {precision} graphs agree with PyTorch on {proof['images']} images: "
        f"{proof['detections']} detections, boxes within {proof['box']:.1e} px, scores within "
        f"{proof['score']:.1e}, mask pixels within {proof['mask']:.1e}, maps within "
        f"{max(proof['relative'].values()):.1e} relative",
        err=to_stderr,
    )
    exchanged = proof["contested_proposals"], proof["contested_detections"]
    if any(exchanged):
        click.echo(
            f"  of {proof['proposals']} proposals {exchanged[0]}, and {exchanged[1]} detections, have "
            f"no partner but near-ties"
            + (
                ": more than of a trained network, whose scores differ"
                if proof["degenerate"]
                else ""
            ),
            err=to_stderr,
        )
    if precision == "fp16":
        _print_range(proof, to_stderr=to_stderr)
    if not proof["detections"]:
        _report(
            "warning: PyTorch found nothing in these images, so no detection was compared; name "
            "better ones by --val-data, or lower --score-threshold"
        )


def _print_range(proof: dict[str, Any], *, to_stderr: bool) -> None:
    """What fp16 could not hold, and how much it could hold beyond the largest value that it holds."""
    for island in proof["float_layers"]:
        click.echo(f"  kept in fp32: {island['module']}, since {island['reason']}", err=to_stderr)
    found = proof["range"]
    place = "" if found["image"] is None else f" on image {found['image']}"
    click.echo(
        f"  the largest value in fp16 is {found['largest']:.2e} ({found['kind']} of {found['module']}"
        f"{place}), 1/{found['end'] / found['largest']:.0f} of what it holds",
        err=to_stderr,
    )


def _print_engines(engines: EngineFolder, *, to_stderr: bool) -> None:
    """What was built, and which layers have which precision."""
    from comask.runtime.trt.engine_folder import PLANS

    info = engines.info
    for stage, file in PLANS.items():
        layers = info.layers[stage]
        where = "network" if layers["engine"] is None else "engine"
        kinds = ", ".join(f"{count} {kind}" for kind, count in layers[where].items())
        size = (engines.folder / file).stat().st_size / 2**20
        click.echo(
            f"{engines.folder / file}: {size:.0f} MiB, built in {info.seconds[stage]:.1f} s; of "
            f"{layers['of']} convolutions and products {kinds or 'none'}, read from the {where}",
            err=to_stderr,
        )
    proof = info.verification
    if "not_run" in proof:
        _report(f"warning: these engines were not run: {proof['not_run']}")
        return
    click.echo(
        f"{engines.folder}: agrees with {proof['reference']} on {proof['detections']} detections, "
        f"boxes within {proof['box']:.1e} px, scores within {proof['score']:.1e}, maps within "
        f"{max(proof['relative'].values()):.1e} relative",
        err=to_stderr,
    )


def _images(data: str, count: int) -> list[NDArray[np.uint8]]:
    from comask.data.open_source import open_source
    from comask.data.source import readable_images

    source = open_source(data, "val", shapes_images=4 * count, shapes_seed=VERIFY_SEED)
    # those with most objects: an empty image proves little
    busiest = sorted(range(len(source)), key=lambda i: -len(source.annotations(i)))
    images = [pixels for _, pixels in islice(readable_images(source, busiest), count)]
    if not images:
        raise ComaskError(f"--val-data {data}: holds no images")
    return images
