"""Diagnoses whether a bundle is intact and its engines run on this machine, for `comask doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from comask.bundle import Bundle
from comask.errors import BackendUnavailableError, BundleError, EngineError
from comask.evaluate import ap_text
from comask.runtime.doctor import Advice, Finding, run_check
from comask.runtime.gpu import find_gpu
from comask.runtime.trt.engine_folder import (
    ENGINES,
    PLANS,
    EngineFolder,
    rebuild_command,
    why_not_on,
)
from comask.runtime.trt.flavor import load_flavor
from comask.runtime.trt.ops import kernels_sha256


def diagnose_bundle(folder: Path) -> list[Finding]:
    """Compares a bundle's files with their hashes, and its engines with this machine."""
    try:
        bundle = Bundle.open(folder)
    except BundleError as error:
        fix = "comask export CHECKPOINT --output BUNDLE"
        return [Finding(name="bundle", status="broken", found=str(error), fix=fix)]
    manifest = bundle.manifest
    found = (
        f"{folder}: {', '.join(manifest.precisions)}, {len(manifest.categories)} classes, written by "
        f"comask {manifest.comask_version}"
    )
    return [
        Finding(name="bundle", status="ok", found=found),
        *_files(bundle),
        *_precisions(manifest.verification),
        *_parity(bundle),
        *_engines(bundle),
    ]


def _files(bundle: Bundle) -> list[Finding]:
    """Returns a finding for each file that differs from the manifest, or one if none does."""
    findings = [run_check(name, partial(_file, bundle, name)) for name in bundle.manifest.files]
    found = f"all {len(findings)} have the manifest's hashes"
    broken = [finding for finding in findings if finding.status != "ok"]
    return broken or [Finding(name="bundle's files", status="ok", found=found)]


def _file(bundle: Bundle, name: str) -> str:
    try:
        return str(bundle.file(name))
    except BundleError as error:
        fix = "export the checkpoint again, or copy the bundle again from an intact one"
        raise Advice("broken", error, fix) from error


def _precisions(verification: Mapping[str, Any]) -> Iterator[Finding]:
    """Says which layers stayed in float in the lower precisions, and how much AP int8 costs."""
    if proof := verification.get("fp16"):
        # older bundles have no such list
        islands = [island["module"] for island in proof.get("float_layers", [])]
        found = f"stay f32: {', '.join(islands)}" if islands else "only what always does stays f32"
        yield Finding(name="fp16 graphs", status="ok", found=found)
    if proof := verification.get("int8"):
        kept = [entry["layer"] for entry in proof["float_layers"]]
        floats = f", float: {', '.join(kept)}" if kept else ""
        ap = ", ".join(
            f"{task} AP {value:.2f} ({value - proof['reference'][task]:+.2f})"
            for task, value in proof["ap"].items()
        )
        found = (
            f"{proof['layers'] - len(kept)} of {proof['layers']} layers in int8{floats}; {ap} on "
            f"{proof['images']} images of {proof['data']}, {proof['budget']:g} allowed"
        )
        yield Finding(name="int8 graphs", status="ok", found=found)


def _parity(bundle: Bundle) -> list[Finding]:
    """Returns `comask eval`'s latest record of each backend, data set and setting."""
    latest: dict[str, Finding] = {}
    for entry in sorted(bundle.manifest.parity, key=lambda entry: str(entry["when"])):
        knobs = "".join(
            f", {knob} {entry[knob]}"
            for knob in ("boxes", "proposals", "short_side")
            if entry.get(knob) not in (None, "annotated")
        )
        subject = f"on {entry['data']}{knobs}"
        checks: dict[str, Callable[[], str]] = {
            f"parity of {backend} {subject}": partial(_compared, bundle, entry, backend)
            for backend in entry["backends"]
        }
        # older entries have neither `failures` nor `not_judged`
        passed = all(compared["passed"] for compared in entry["comparisons"].values())
        if entry.get("not_judged") and passed and not entry.get("failures"):
            checks = {f"parity {subject}": partial(_not_judged, entry)}
        latest |= {name: run_check(name, check) for name, check in checks.items()}
    return list(latest.values())


def _not_judged(entry: Mapping[str, Any]) -> str:
    raise Advice("absent", "nothing was compared", entry["not_judged"])


def _compared(bundle: Bundle, entry: Mapping[str, Any], backend: str) -> str:
    """Returns the AP of a backend in a manifest's entry, and its difference from the reference."""
    compared = entry["comparisons"].get(backend)
    numbers = []
    for task, what in (("bbox", "box"), ("segm", "mask")):
        text = f"{what} AP {ap_text(entry['backends'][backend][task]['AP'])}"
        if compared:
            text += f" ({compared['deltas'][task]['AP']:+.2f})"
        numbers.append(text)
    found = f"{', '.join(numbers)} on {entry['images']} images, {str(entry['when'])[:10]}"
    # a failure of the whole comparison counts against its reference
    if not (compared["passed"] if compared else not entry.get("failures")):
        page = f"comask eval {bundle.folder} --data {entry['data']} --report report.html"
        raise Advice("broken", f"{found}: FAILED", f"{page} names what differs")
    return f"{found}: {'passed' if compared else 'reference'}"


def _engines(bundle: Bundle) -> list[Finding]:
    folder = bundle.folder / ENGINES
    if folder.exists() and not folder.is_dir():
        fix = f"rm {folder}: comask build makes a folder of that name"
        return [Finding(name=ENGINES, status="broken", found="is not a folder", fix=fix)]
    folders = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    return [run_check(f"{ENGINES}/{path.name}", partial(_engine, bundle, path)) for path in folders]


def _engine(bundle: Bundle, path: Path) -> str:
    try:
        engines = EngineFolder.open(path)
        for stage in PLANS:
            engines.plan(stage)
    except EngineError as error:
        fix = f"rm -r {path}, and build it again: comask build {bundle.folder} --engine …"
        raise Advice("broken", error, fix) from error
    try:
        version = load_flavor(engines.info.flavor).version
    except BackendUnavailableError as error:
        raise Advice("absent", error, "") from error
    gpu = find_gpu()
    reasons = engines.mismatches(bundle, version, gpu, kernels_sha256())
    if reasons == [why_not_on(engines.info, gpu)]:
        raise Advice("absent", f"intact, but not for this machine: {reasons[0]}", "")
    if reasons:
        raise Advice("broken", "; ".join(reasons), rebuild_command(engines))
    return "runs on this machine"
