"""`report.html` of `comask-eval`: one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from comask.data.source import not_decoded_text
from comask.evaluate import COCO_DETECTIONS, METRICS, TASKS, ap_text
from comask.page import facts, page, picture, table
from comask.runtime.compare import PYRAMID, TOLERANCES
from comask.runtime.parity.contestants import precision_of
from comask.runtime.parity.judge import change_text, has_failed

NAMES = {"bbox": "box", "segm": "mask"}


def parity_page(
    report: Mapping[str, Any], pictures: Mapping[str, Sequence[tuple[str, bytes]]]
) -> str:
    """The page of a report of `comask-eval`.

    Args:
        report: as `--json` writes it.
        pictures: by contestant captions and JPEGs.
    """
    return page(
        f"Parity of {report['bundle']}",
        [
            _verdict(report),
            _accuracy(report),
            _second_stage(report),
            *precision_sections(report["verification"]),
            _stages(report),
            *(_trace(name, trace) for name, trace in report["traces"].items()),
            _pictures(report, pictures),
            _classes(report),
            _twelve(report),
            _machine(report),
        ],
    )


def _verdict(report: Mapping[str, Any]) -> str:
    word, kind = ("PASS", "pass") if report["passed"] else ("FAIL", "fail")
    others = len(report["comparisons"])
    if report["passed"]:
        text = f"{others} of {others} compute what {report['reference']} does."
    elif has_failed(report):
        text = "Not everything computes what the reference does."
    else:
        word = "NOT JUDGED" if others else "SCORED"
        text = f"{report['reference']}: {report['not_judged']}."
    parts = [f'<p class="verdict {kind}">{word}</p><p>{escape(text)}</p>']
    items = [f"<li>{escape(sentence)}</li>" for sentence in report["failures"]]
    for name, found in report["comparisons"].items():
        items += [
            f"<li><strong>{escape(name)}</strong>: {escape(sentence)}</li>"
            for sentence in found["failures"]
        ]
    if items:
        parts.append(f"<ul>{''.join(items)}</ul>")
    if report["skipped"]:
        rows = report["skipped"].items()
        parts.append(f"<p>Not compared, since they do not run here:</p>{table(('', 'why'), rows)}")
    knobs = [
        (name.replace("_", " "), str(report[name]))
        for name in ("proposals", "short_side")
        if report[name] is not None
    ]
    return "".join(parts) + facts(
        [
            ("data", f"{report['data']}, {report['images']} images"),
            *([("left out", not_decoded_text(report))] if report["not_decoded"] else []),
            ("detections", f"the {report['max_detections']} best of each image count"),
            ("reference", report["reference"]),
            *knobs,
            ("measured", report["when"].replace("T", " ").removesuffix("+00:00") + " UTC"),
        ]
    )


def _accuracy(report: Mapping[str, Any]) -> str:
    rows = []
    limit = report["max_detections"]
    for name, values in report["backends"].items():
        found = report["comparisons"].get(name)
        cells = []
        for task in TASKS:
            cells.append(ap_text(values[task]["AP"]))
            if values["coco_ap"]:
                cells[-1] += f" ({ap_text(values['coco_ap'][task])})"
            change = found and change_text(values[task]["AP"], found["deltas"][task]["AP"])
            cells.append(change or "")
        judged = (f"{found['largest']:.3f}", f"{found['tolerance']:g}") if found else ("", "")
        agreement = f"{found['agreement']:.4f}" if found else ""
        word = _word(found, report["not_judged"])
        rows.append((name, *cells, *judged, f"{values['detections']:,}", agreement, word))
    head = ("AP points", "box AP", "difference", "mask AP", "difference", "largest difference",
            "allowed", "detections", "agreement", "verdict")  # fmt: skip
    note = (
        "Largest difference: of all twelve COCO numbers of boxes and masks; of other pipelines, of AP "
        "alone; of fp16 and int8, what AP loses. Agreement: 1 where the same instances were found "
        "with the same scores, boxes and masks, whatever the ground truth says."
    )
    if limit != COCO_DETECTIONS:
        note = (
            f"AP counts the {limit} best detections of each image; in parentheses with COCO's "
            f"{COCO_DETECTIONS}. {note}"
        )
    return f'<h2>Accuracy</h2>{table(head, rows)}<p class="note">{note}</p>'


def _word(found: Mapping[str, Any] | None, not_judged: str) -> str:
    """The verdict on one backend."""
    if not found:
        return "reference"
    if not found["passed"]:
        return "FAIL"
    return "not judged" if not_judged else "PASS"


def _second_stage(report: Mapping[str, Any]) -> str:
    rows = []
    for name, values in report["backends"].items():
        stages = {stage: values[stage] or {} for stage in ("first", "plain")} | {"final": values}
        shown = [("first", "bbox"), ("plain", "bbox"), ("final", "bbox"), ("first", "segm"),
                 ("final", "segm")]  # fmt: skip
        cells = (stages[stage].get(task, {}).get("AP", -1.0) for stage, task in shown)
        rows.append((name, *map(ap_text, cells)))
    head = (
        "AP points",
        "box: proposal",
        "plain average",
        "weighted average",
        "mask: coarse",
        "final",
    )
    note = (
        "Any second stage turns proposals into better boxes. What the mask adds to it is the difference "
        "between the plain average, in which all cells of the box count alike, and the weighted one. "
        "n/a: the graphs do not give it (comask-export --diagnostics)."
    )
    return f'<h2>What the second stage adds</h2>{table(head, rows)}<p class="note">{note}</p>'


def _stages(report: Mapping[str, Any]) -> str:
    compared = {n: f["stages"] for n, f in report["comparisons"].items() if "stages" in f}
    if not compared:
        return ""
    rows = []
    for name, found in compared.items():
        limit = TOLERANCES.get(precision_of(name))
        allowed = f"{limit.relative:g}" if limit and found["judged"] else "not judged"
        rows.append(
            (
                name,
                *(f"{found['relative'][level]:.2g}" for level in PYRAMID),
                allowed,
                f"{found['contested_proposals']} of {found['proposals']:,}",
                f"{found['contested_detections']} of {found['detections']:,}",
                f"{found['box']:.2g}", f"{found['score']:.2g}", f"{found['mask']:.2g}",
            )
        )  # fmt: skip
    head = ("", *PYRAMID, "allowed", "proposals alone", "detections alone", "box, px", "score",
            "mask pixel")  # fmt: skip
    lists = "".join(
        f"<h3>{escape(name)}: {found['beyond']:,} beyond tolerance, first of all</h3><ul>"
        + "".join(f"<li>{escape(failure)}</li>" for failure in found["failures"])
        + "</ul>"
        for name, found in compared.items()
        if found["failures"]
    )
    count = next(iter(compared.values()))["images"]
    note = (
        f"On {count} images, each stage alone: stage 2 of both gets the reference's stage 1. p2 … p5: "
        "max|a-b| / max|a|. Alone: without a partner, which only near-ties of scores excuse. Box, "
        "score, mask: largest difference of partners."
    )
    return f'<h2>Stage by stage</h2>{table(head, rows)}<p class="note">{note}</p>{lists}'


def _trace(name: str, trace: Mapping[str, Any]) -> str:
    title = f"<h2>Layer by layer: {escape(name)}</h2>"
    worst = max(trace["differences"], key=lambda entry: entry["relative"])
    summary = trace["cause"] or (
        f"every layer agrees within {trace['limit']:g}; largest difference: {worst['tensor']} "
        f"({worst['stage']}), relative error {worst['relative']:.2g}"
    )
    rows = [
        (
            entry["tensor"], entry["stage"], f"{entry['relative']:.2g}",
            "" if entry["relative"] <= trace["limit"] else "beyond",
        )
        for entry in trace["differences"]
    ]  # fmt: skip
    listed = table(("tensor", "stage", "relative error", ""), rows)
    h, w = trace["size"]
    note = (
        "At each layer the network read what the graph's layer read, so that each is judged alone."
    )
    return (
        f'{title}<p>{escape(summary)}</p><p class="note">{note}</p><details><summary>all {len(rows)} '
        f"tensors, in the graphs' order, on one image of {w}x{h} pixels</summary>{listed}</details>"
    )


def _pictures(
    report: Mapping[str, Any], pictures: Mapping[str, Sequence[tuple[str, bytes]]]
) -> str:
    def one(name: str) -> Iterator[str]:
        yield f"<h3>{escape(name)}</h3>"
        for caption, content in pictures[name]:
            yield f'<p class="note">{escape(caption)}</p>{picture(content, caption, "jpeg")}'
        if not pictures[name]:
            yield "<p>It agrees on every image.</p>"

    shown = list(report["comparisons"])
    if not shown:
        return ""
    note = "The images on which each agrees least with the reference. Pink frames: the other has no such."
    return f'<h2>Worst disagreements</h2><p class="note">{note}</p>' + "".join(
        part for name in shown for part in one(name)
    )


def _classes(report: Mapping[str, Any]) -> str:
    names = list(report["backends"])
    parts = []
    for task in TASKS:
        classes = sorted({c for name in names for c in report["backends"][name]["per_class"][task]})
        rows = []
        for label in classes:
            values = [report["backends"][n]["per_class"][task].get(label, -1.0) for n in names]
            cells = [ap_text(100 * values[0])]
            cells += [f"{100 * (v - values[0]):+.2f}" for v in values[1:]]
            rows.append((label, *cells))
        head = ("class", f"{names[0]}, AP", *(f"{name}, difference" for name in names[1:]))
        parts.append(f"<h3>{NAMES[task]} AP</h3>{table(head, rows)}")
    return "<h2>Classes</h2>" + "".join(parts)


def _twelve(report: Mapping[str, Any]) -> str:
    parts = []
    for task in TASKS:
        rows = []
        for name, values in report["backends"].items():
            rows.append((name, *(ap_text(values[task][metric]) for metric in METRICS)))
            if found := report["comparisons"].get(name):
                deltas = found["deltas"][task]
                changes = (change_text(values[task][metric], deltas[metric]) for metric in METRICS)
                rows.append(("difference", *changes))
        parts.append(f"<h3>{NAMES[task]}</h3>{table(('AP points', *METRICS), rows)}")
    return "<h2>COCO's twelve numbers</h2>" + "".join(parts)


def _machine(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    rows = [("processor", f"{machine['cpu']}, {machine['cores']} cores"),
            ("GPU", machine["gpu"] or "none"), ("system", machine["system"]),
            *machine["versions"].items()]  # fmt: skip
    return f"<h2>Measured on</h2>{table(('', ''), rows)}"


def precision_sections(verification: Mapping[str, Any]) -> list[str]:
    """A section on fp16 and one on int8, where the bundle has them.

    Args:
        verification: of the bundle's manifest.
    """
    makers = {"fp16": _fp16, "int8": _int8}
    return [make(verification[name]) for name, make in makers.items() if name in verification]


def _fp16(proof: Mapping[str, Any]) -> str:
    islands = proof.get("float_layers", [])  # older bundles have no such list
    if not islands:
        return ""
    rows = [
        (island["module"], f"{island['largest']:.4g}", island["image"], island["reason"])
        for island in islands
    ]
    listed = table(("module that stays f32", "largest value", "on image", "reason"), rows)
    return f"<h2>How fp16 was made</h2>{listed}"


def _int8(proof: Mapping[str, Any]) -> str:
    calibration, sizes, (loss, error) = proof["calibration"], proof["bytes"], proof["loss"]
    kept = proof["float_layers"]
    times = proof["latency"]
    summary = facts(
        [
            ("calibrated on", f"{calibration['images']} images of {calibration['data']}"),
            ("by", f"{calibration['method']}, seed {calibration['seed']}"),
            ("layers in int8", f"{proof['layers'] - len(kept)} of {proof['layers']}"),
            ("points lost", f"{loss:+.2f} ± {error:.2f} of {proof['budget']:g} allowed"),
            ("on", f"{proof['images']} images of {proof['data']}"),
            ("ms an image", f"{1e3 * times['int8']:.2f}, fp16 {1e3 * times['fp16']:.2f}" if times
             else "not measured"),
        ]
    )  # fmt: skip
    ap = table(
        ("AP points", "PyTorch", "int8"),
        [(task, f"{value:.2f}", f"{proof['ap'][task]:.2f}")
         for task, value in proof["reference"].items()],
    )  # fmt: skip
    size = table(
        ("graphs", "MB", "of fp32"),
        [(name, f"{count / 1e6:.2f}", f"{count / sizes['fp32']:.3f}")
         for name, count in sizes.items()],
    )  # fmt: skip
    trials = table(
        ("float layers", "points lost", "± standard error"),
        [(str(trial["float_layers"]), f"{trial['loss']:+.2f}", f"{trial['error']:.2f}")
         for trial in proof["trials"]],
    )  # fmt: skip
    floats = (
        table(("layer that stays float", "reason"), [(e["layer"], e["reason"]) for e in kept])
        if kept
        else "<p>Every layer is int8.</p>"
    )
    return f"<h2>How int8 was made</h2>{summary}{ap}{floats}<h3>Trials</h3>{trials}<h3>Sizes</h3>{size}"
