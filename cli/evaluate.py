"""`comask eval`: is every backend of a bundle still the model that was trained?"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from comask.cli.command import command, option
from comask.cli.options import (
    backends_option,
    check_outputs,
    json_option,
    predictor_options,
    scored_source,
    write_json,
)
from comask.data.source import not_decoded_text
from comask.errors import one_line
from comask.evaluate import COCO_DETECTIONS, METRICS, ap_text
from comask.files import write_whole
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions
from comask.runtime.parity.report import change_text, parity_page
from comask.runtime.parity.scores import labels_in_data

if TYPE_CHECKING:
    from rich.table import Table

    from comask.bundle import Bundle, ScoreThresholds
    from comask.runtime.parity.report import ParityReport

WIDE, NARROW = 120, 6  # columns that all twelve numbers take; how many of them fit into 80


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--data", required=True, metavar="DATA|shapes", help="Data set with masks.")
@option("--limit", "images", type=click.IntRange(1), metavar="N", aliases=("--images",),
        help="Score the first N images only. [all; shapes: 200]")  # fmt: skip
@option("--results", type=click.Path(path_type=Path), metavar="FILE",
        help="Also score COCO results of your own pipeline.")  # fmt: skip
@option("--boxes", type=click.Choice(["annotated", "mask"]), default="annotated",
        help="Ground-truth boxes: as annotated, or the masks' bounds. [annotated]")  # fmt: skip
@option("--tolerance", type=click.FloatRange(0), metavar="POINTS",
        help="AP points of difference allowed. [0.1; int8: its budget]")  # fmt: skip
@option("--trace", is_flag=True, help="Compare every layer, also where nothing fails.")
@option("--no-record", is_flag=True, help="Leave the bundle's manifest as it is.")
@option("--report", "report_file", metavar="FILE", help="Write a page with pictures (HTML).")
@json_option
@backends_option("[torch, onnxruntime, engines]")
@predictor_options(batch=8)
def main(
    bundle: Path,
    data: str,
    backends: tuple[str, ...],
    results: Path | None,
    boxes: Literal["annotated", "mask"],
    images: int | None,
    tolerance: float | None,
    trace: bool,
    how: LoadOptions,
    no_record: bool,
    report_file: str | None,
    json_file: str | None,
) -> None:
    """Compare the AP of every backend with PyTorch's, and find where a difference begins.

    Exits with 1 when AP, outputs, weights or the preprocessing differ by more than a precision allows, or
    when nothing was found or compared. Classes are matched by name.

    \b
    comask eval bundle --data coco --report report.html
    """
    from comask.bundle import Bundle
    from comask.evaluate import Truth
    from comask.runtime.parity.evaluation import Evaluation
    from comask.runtime.parity.open_backends import default_backends, open_backends
    from comask.runtime.parity.scores import read_results

    check_outputs(report=report_file, json=json_file)
    opened = Bundle.open(bundle)
    required, optional = (list(backends), []) if backends else default_backends(opened)
    with ExitStack() as stack:
        predictors, skipped = open_backends(
            required, optional, lambda name: Predictor.open(bundle, name, how), stack
        )
        source, indices = scored_source(data, images, boxes)
        foreign = {results.name: read_results(results, source, indices)} if results else {}
        most = max((len(rows) for found in foreign.values() for rows in found), default=0)
        evaluation = Evaluation(
            bundle=opened,
            data=data,
            boxes=boxes,
            how=how,
            skipped=skipped,
            truth=Truth(source, indices),
            detections=max(opened.manifest.model.detections, most),
            labels=labels_in_data(opened.manifest, source),
            tolerance=tolerance,
            trace=trace,
            altered_scales=_altered_scales(opened) if "onnxruntime:int8" in predictors else [],
            draw=report_file is not None,
        )
        report, pictures = evaluation.run(predictors, foreign)
    print_report(report, to_stderr=json_file == "-")
    if not no_record:
        measured = report.without(results.name) if results else report
        _record(opened.folder, measured, _thresholds(report, how))
    if report_file is not None:
        write_whole(Path(report_file), parity_page(report, pictures))
    write_json(json_file, report.to_json())
    if not report.passed:
        sys.exit(1)


def _altered_scales(bundle: Bundle) -> list[str]:
    """Returns which int8 scales differ from the calibration's; warns where they cannot be compared."""
    from comask.errors import CalibrationError

    try:
        from comask.calib.qdq import altered_scales

        return altered_scales(bundle)
    except (CalibrationError, ImportError) as error:
        click.echo(f"warning: the scales of int8 activations are not compared: {error}", err=True)
        return []


def _record(folder: Path, report: ParityReport, thresholds: ScoreThresholds | None) -> None:
    """Writes the result and the thresholds into the manifest, and says what became of the latter.

    The result replaces an older one of the same data and settings. Layers and errors are left out, and so
    are results that are not the bundle's. Results are recorded only if two of the bundle's backends were
    compared. Thresholds that were measured on more images of the same data stay.
    """
    from comask.bundle import Manifest, update_manifest
    from comask.errors import BundleError

    def subject(entry: dict[str, Any]) -> tuple[Any, ...]:
        # older entries have none of these keys
        boxes = entry.get("boxes", "annotated")
        names = "proposals", "short_side", "tile", "tile_overlap", "tta"
        return entry["data"], sorted(entry["backends"]), boxes, *map(entry.get, names)

    if not report.comparisons and thresholds is None:
        return
    left_out = ("bundle", "traces", "weights", "verification", "errors")
    entry = {key: value for key, value in report.to_json().items() if key not in left_out}

    def change(manifest: Manifest) -> Manifest:
        parity, old = manifest.parity, manifest.thresholds
        if report.comparisons:
            parity = [*(other for other in parity if subject(other) != subject(entry)), entry]
        stays = thresholds is None or (
            old is not None and old.data == thresholds.data and old.images > thresholds.images
        )
        return dataclasses.replace(manifest, parity=parity, thresholds=old if stays else thresholds)

    try:
        recorded = update_manifest(folder, change).manifest
    except (OSError, BundleError) as error:
        click.echo(f"warning: the result is not recorded in the bundle: {error}", err=True)
        return
    if thresholds is None or recorded.thresholds is None:
        return
    if recorded.thresholds == thresholds:
        found, classes = len(thresholds.classes), len(recorded.categories)
        text = f"recorded in the bundle for {found} of {classes} classes"
    else:
        text = f"those of {recorded.thresholds.images} images of the same data stay in the bundle"
    click.echo(f"score thresholds: {text}", err=True)


def _thresholds(report: ParityReport, how: LoadOptions) -> ScoreThresholds | None:
    """Returns the reference's best thresholds, or None if they hold for nothing, after saying why.

    They hold for the bundle's own settings, and only classes of which something is found have one.
    """
    from comask.bundle import ScoreThresholds

    own = LoadOptions(device=how.device, on_mismatch=how.on_mismatch, max_batch=how.max_batch)
    classes = report.errors.tasks["segm"].thresholds
    problem = "" if classes else "no detection of any class is right"
    if how != own:
        problem = "they would hold for other settings than the bundle's own"
    if problem:
        click.echo(f"score thresholds: not recorded, since {problem}", err=True)
        return None
    return ScoreThresholds(
        classes=classes, backend=report.reference, data=report.data, images=report.images
    )


def print_report(report: ParityReport, *, to_stderr: bool) -> None:
    """Prints tables of AP, then a verdict on each backend with its reasons."""
    from rich.console import Console

    # file names may look like rich's markup
    width = None if sys.stdout.isatty() else 140
    console = Console(stderr=to_stderr, width=width, markup=False, highlight=False)
    for task, title in (("bbox", "boxes"), ("segm", "masks")):
        heading = (
            f"{title}, AP points on {report.images} images, the {report.max_detections} best "
            f"detections of each"
        )
        console.print(_table(report, task, heading, wide=console.width >= WIDE))

    def say(text: str) -> None:
        console.print(one_line(text), soft_wrap=True)

    if report.not_decoded:
        text = not_decoded_text(report.not_decoded, report.images)
        say(f"{text}; their annotations do not count")
    for name, reason in report.skipped.items():
        say(f"skipped {name}: {reason}")
    for sentence in report.failures:
        say(f"FAIL {sentence}")
    if report.not_judged:
        word = "NOT JUDGED" if report.comparisons else "SCORED"
        say(f"{word} {report.reference}: {report.not_judged}")
    for name, found in report.comparisons.items():
        if found.passed and report.not_judged:
            continue
        off = "below" if found.may_gain else "off"
        say(
            f"{'PASS' if found.passed else 'FAIL'} {name}: at most {found.largest:.4f} points {off} "
            f"{report.reference} (tolerance {found.tolerance:g}), agreement {found.agreement:.4f}, "
            f"{report.backends[name].detections} detections"
        )
        for sentence in found.failures:
            say(f"     {sentence}")
    for name, trace in report.traces.items():
        say(
            f"traced {name}: {len(trace.differences)} tensors of layers, the largest relative "
            f"error is {trace.worst.relative:.2g} ({trace.worst.tensor})"
        )


def _table(report: ParityReport, task: str, title: str, *, wide: bool) -> Table:
    """Returns a table of COCO's numbers per backend, the differences, and AP before the second stage.

    The last columns are AP with COCO's 100 detections per image, where more are counted; AP of the first
    stage; and for boxes, AP of the plain average of the cells.
    """
    from rich import box
    from rich.table import Table

    metrics = METRICS if wide else METRICS[:NARROW]
    caption = None if wide else f"a window of {WIDE} columns, --json or --report shows all twelve"
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("backend", no_wrap=True)
    capped = report.max_detections != COCO_DETECTIONS
    stages = ["first", "plain"] if task == "bbox" else ["coarse"]
    more = ([f"AP@{COCO_DETECTIONS}"] if capped else []) + stages
    for metric in (*metrics, *more):
        table.add_column(metric, justify="right")
    for name, points in report.backends.items():
        values = points.tasks[task]
        cells = [values[metric] for metric in metrics]
        cells += [points.coco_ap[task]] if capped else []
        for stage, _ in zip((points.first, points.plain), stages, strict=False):
            cells.append(stage.tasks[task]["AP"] if stage else -1.0)
        table.add_row(name, *map(ap_text, cells))
        if found := report.comparisons.get(name):
            deltas = found.deltas[task]
            changes = [change_text(values[metric], deltas[metric]) for metric in metrics]
            table.add_row("  difference", *changes, style="dim")
    return table
