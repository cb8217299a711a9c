"""`comask-eval`: is every backend of a bundle still the model that was trained?"""

from __future__ import annotations

import dataclasses
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from comask.cli.options import command, json_option, write_json
from comask.cli.predictor_options import PredictorOptions, predictor_options

from comask.errors import DataError

if TYPE_CHECKING:
    from comask.bundle import Bundle
    from comask.data.source import InstanceSource
    from comask.evaluate import CocoMetrics

SHAPES_SEED = 3_000_000  # images that neither training, validation nor export saw


@command
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DIR|shapes", help="COCO-format folder with masks.")
@click.option("--backend", "backends", multiple=True, metavar="NAME[:PRECISION]",
              help="Repeated; the first is the reference. Default: torch, onnxruntime.")  # fmt: skip
@click.option("--images", type=click.IntRange(1), help="Only the first so many (shapes: 200).")
@click.option("--tolerance", type=click.FloatRange(0), default=0.1, show_default=True,
              help="AP points that a backend may lie off the reference.")  # fmt: skip
@predictor_options(batch=8)
@click.option("--no-record", is_flag=True, help="Leave the bundle's manifest as it is.")
@json_option
def main(
    bundle: Path,
    data: str,
    backends: tuple[str, ...],
    images: int | None,
    tolerance: float,
    how: PredictorOptions,
    no_record: bool,
    json_file: str | None,
) -> None:
    """Box and mask AP of BUNDLE on every backend, and how far each is off the first.

    Exits with 1 when any of COCO's twelve numbers of boxes or masks differs by more than the
    tolerance, or when there was not one detection to compare. Classes are matched by name.
    """
    from comask.bundle import Bundle

    backends = backends or ("torch", "onnxruntime")
    opened = Bundle.open(bundle)
    for name in backends:
        if name == "auto":
            raise click.UsageError("--backend auto: name the backends that are to be compared")
        how.load(bundle, name).close()  # before the first is scored, which may take hours
    from comask.data.open_source import open_source

    source = open_source(data, "val", shapes_images=images or 200, shapes_seed=SHAPES_SEED)
    indices = list(range(min(images or len(source), len(source))))
    results = {name: _score(opened, name, source, indices, how) for name in backends}
    report = _report(results, tolerance) | {
        "bundle": str(bundle), "data": data,
        "proposals": how.proposals, "short_side": how.short_side,  # null: the bundle's
    }  # fmt: skip
    _print(results, report, to_stderr=json_file == "-")
    if not no_record:
        _record(opened, report)
    write_json(json_file, report)
    if not report["passed"]:
        sys.exit(1)


def _score(
    bundle: Bundle, backend: str, source: InstanceSource, indices: list[int], how: PredictorOptions
) -> CocoMetrics:
    """AP of one backend; its labels are renumbered to the data's by class name."""
    import numpy as np

    from comask.evaluate import evaluate
    from comask.progress import Progress

    theirs = {category.name: label for label, category in enumerate(source.categories)}
    ours = [category.name for category in bundle.manifest.categories]
    if set(theirs) != set(ours):
        missing, surplus = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        raise DataError(
            f"the data's categories are not the bundle's: not in the data {missing[:5]}, "
            f"not in the bundle {surplus[:5]}; evaluate on data with the classes that were trained"
        )
    label_in_data = np.array([theirs[name] for name in ours], dtype=np.int64)
    with (
        how.load(bundle.folder, backend) as predictor,
        Progress(f"evaluating {backend}", len(indices), unit="images") as progress,
    ):
        found = []
        for detections in predictor.map(source.image(i) for i in indices):
            labels = label_in_data[detections.labels]
            found.append(dataclasses.replace(detections, labels=labels, class_names=None))
            progress.advance()
    return evaluate(source, indices, found)


def _report(results: dict[str, CocoMetrics], tolerance: float) -> dict[str, Any]:
    """Everything in AP points (100 × AP); a -1 (no such objects) is compared only with -1."""
    reference, *others = results
    base = results[reference]
    report: dict[str, Any] = {
        "reference": reference,
        "tolerance": tolerance,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": base.images,
        "backends": {name: _points(metrics) for name, metrics in results.items()},
        "comparisons": {},
        "passed": all(metrics.detections > 0 for metrics in results.values()),
    }
    for name in others:
        metrics = results[name]
        deltas = {
            task: {key: 100 * (value - base.values[task][key]) for key, value in values.items()}
            for task, values in metrics.values.items()
        }
        worst_class = {
            task: sorted(
                (100 * (ap - base.per_class[task][label]), label)
                for label, ap in metrics.per_class[task].items()
            )[:3]
            for task in metrics.per_class
        }
        largest = max(abs(delta) for values in deltas.values() for delta in values.values())
        report["comparisons"][name] = {
            "deltas": deltas,
            "largest": largest,
            "worst_classes": worst_class,
            "passed": largest <= tolerance,
        }
        report["passed"] &= largest <= tolerance
    return report


def _points(metrics: CocoMetrics) -> dict[str, Any]:
    """One backend's AP in points, -1 kept."""
    values = {
        task: {key: 100 * value if value >= 0 else -1.0 for key, value in numbers.items()}
        for task, numbers in metrics.values.items()
    }
    return {**values, "detections": metrics.detections, "per_class": metrics.per_class}


def _print(results: dict[str, CocoMetrics], report: dict[str, Any], *, to_stderr: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from comask.evaluate import METRICS

    console = Console(stderr=to_stderr, width=None if sys.stdout.isatty() else 130)
    for task, title in (("bbox", "boxes"), ("segm", "masks")):
        table = Table(title=f"{title}, AP points on {report['images']} images")
        table.add_column("backend")
        for metric in METRICS:
            table.add_column(metric, justify="right")
        for name in results:
            values = report["backends"][name][task]
            table.add_row(name, *(f"{v:.2f}" if v >= 0 else "-" for v in values.values()))
            if name in report["comparisons"]:
                deltas = report["comparisons"][name]["deltas"][task].values()
                table.add_row("  difference", *(f"{delta:+.3f}" for delta in deltas), style="dim")
        console.print(table)
    for name, metrics in results.items():
        if not metrics.detections:
            console.print(f"FAIL {name}: no detections at all, so nothing was compared")
    for name, comparison in report["comparisons"].items():
        verdict = "PASS" if comparison["passed"] else "FAIL"
        console.print(
            f"{verdict} {name}: at most {comparison['largest']:.4f} points off "
            f"{report['reference']} (tolerance {report['tolerance']}), "
            f"{results[name].detections} detections"
        )


def _record(bundle: Bundle, report: dict[str, Any]) -> None:
    """Puts the result into the manifest, in place of an older one of the same subject."""
    from comask.bundle import write_manifest

    def subject(entry: dict[str, Any]) -> tuple[Any, ...]:
        knobs = (entry.get("proposals"), entry.get("short_side"))  # unknown to older entries
        return entry["data"], sorted(entry["backends"]), knobs

    entry = {key: value for key, value in report.items() if key != "bundle"}
    kept = [old for old in bundle.manifest.parity if subject(old) != subject(entry)]
    try:
        write_manifest(bundle.folder, dataclasses.replace(bundle.manifest, parity=[*kept, entry]))
    except OSError as error:
        click.echo(f"warning: the result is not recorded in the bundle: {error}", err=True)
