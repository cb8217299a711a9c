"""Whether a bundle is whole, what was measured of it, and which of its engines run here."""

from __future__ import annotations

from pathlib import Path

from comask.bundle import Bundle
from comask.errors import BackendUnavailableError, BundleError, EngineError
from comask.runtime.diagnosis import Finding
from comask.runtime.gpu import find_gpu
from comask.runtime.parity.judge import points_text
from comask.runtime.parity.verdict import has_failed
from comask.runtime.trt.engine_folder import ENGINES, PLANS, EngineFolder, why_not_on
from comask.runtime.trt.flavors import load_flavor
from comask.runtime.trt.ops import kernels_sha256
from comask.runtime.trt.rebuild import rebuild_command


def diagnose_bundle(folder: Path) -> list[Finding]:
    """Compares every file with its hash, and every engine with this machine."""
    try:
        bundle = Bundle.open(folder)
    except BundleError as error:
        mend = "comask-export CHECKPOINT --output BUNDLE"
        return [Finding(name="bundle", status="broken", found=str(error), mend=mend)]
    manifest = bundle.manifest
    found = (
        f"{folder}: {', '.join(manifest.precisions)}, {len(manifest.categories)} classes, written by "
        f"comask {manifest.comask_version}"
    )
    findings = [Finding(name="bundle", status="ok", found=found)]
    for name in manifest.files:
        try:
            bundle.file(name)
        except BundleError as error:
            mend = "export the checkpoint again, or copy the bundle again from where it is whole"
            findings.append(Finding(name=name, status="broken", found=str(error), mend=mend))
    if len(findings) == 1:
        found = f"{len(manifest.files)} have the manifest's hashes"
        findings.append(Finding(name="bundle's files", status="ok", found=found))
    findings += [*_precisions(bundle), *_parity(bundle)]
    engines = folder / ENGINES
    if engines.exists() and not engines.is_dir():
        mend = f"rm {engines}: comask-export makes a folder of that name"
        findings.append(Finding(name=ENGINES, status="broken", found="is no folder", mend=mend))
    folders = sorted(p for p in (folder / ENGINES).glob("[!.]*") if p.is_dir())
    return findings + [_engine(bundle, path) for path in folders]


def _precisions(bundle: Bundle) -> list[Finding]:
    """What stayed float in the lower precisions, and what int8 costs."""
    findings = []
    verification = bundle.manifest.verification
    if proof := verification.get("fp16"):
        # older bundles have no such list
        islands = [island["module"] for island in proof.get("float_layers", [])]
        found = f"stay f32: {', '.join(islands)}" if islands else "nothing stays f32 but by design"
        findings.append(Finding(name="fp16 graphs", status="ok", found=found))
    if proof := verification.get("int8"):
        kept = [entry["layer"] for entry in proof["float_layers"]]
        ap = ", ".join(
            f"{task} AP {value:.2f} ({value - proof['reference'][task]:+.2f})"
            for task, value in proof["ap"].items()
        )
        found = (
            f"{proof['layers'] - len(kept)} of {proof['layers']} layers in int8"
            + (f", float: {', '.join(kept)}" if kept else "")
            + f"; {ap} on {proof['images']} images of {proof['data']}, {proof['budget']:g} may be lost"
        )
        findings.append(Finding(name="int8 graphs", status="ok", found=found))
    return findings


def _parity(bundle: Bundle) -> list[Finding]:
    """The latest measurement of each backend, data set and setting, as `comask-eval` recorded it."""
    latest: dict[str, Finding] = {}
    for entry in sorted(bundle.manifest.parity, key=lambda entry: str(entry["when"])):
        knobs = "".join(
            f", {knob} {entry[knob]}"
            for knob in ("boxes", "proposals", "short_side")
            if entry.get(knob) not in (None, "annotated")
        )
        if entry.get("not_judged") and not has_failed(entry):  # unknown to older entries
            name = f"parity on {entry['data']}{knobs}"
            found = "nothing was compared"
            latest[name] = Finding(
                name=name, status="absent", found=found, mend=entry["not_judged"]
            )
            continue
        for backend, values in entry["backends"].items():
            name = f"parity of {backend} on {entry['data']}{knobs}"
            compared = entry["comparisons"].get(backend)
            numbers = []
            for task, what in (("bbox", "box"), ("segm", "mask")):
                ap = values[task]["AP"]
                text = f"{what} AP {points_text(ap)}"
                if compared:
                    text += f" ({compared['deltas'][task]['AP']:+.2f})"
                numbers.append(text)
            # what fails the whole fails its reference
            passed = compared["passed"] if compared else not entry.get("failures")
            verdict = ("reference" if not compared else "passed") if passed else "FAILED"
            when = str(entry["when"])[:10]
            found = f"{', '.join(numbers)} on {entry['images']} images, {when}: {verdict}"
            mend = (
                ""
                if passed
                else f"comask-eval {bundle.folder} --data {entry['data']} --report report.html names "
                "what differs"
            )
            status = "ok" if passed else "broken"
            latest[name] = Finding(name=name, status=status, found=found, mend=mend)
    return list(latest.values())


def _engine(bundle: Bundle, path: Path) -> Finding:
    name = f"{ENGINES}/{path.name}"
    try:
        engines = EngineFolder.open(path)
        for stage in PLANS:
            engines.plan(stage)
    except EngineError as error:
        mend = f"rm -r {path}, and build it again by comask-export {bundle.folder} --engine …"
        return Finding(name=name, status="broken", found=str(error), mend=mend)
    info, mend = engines.info, rebuild_command(engines)
    try:
        version = load_flavor(info.flavor).version
    except BackendUnavailableError as error:
        return Finding(name=name, status="absent", found=str(error))
    gpu = find_gpu()
    reasons = engines.mismatches(bundle, version, gpu, kernels_sha256())
    if reasons == [why_not_on(info, gpu)]:
        return Finding(name=name, status="absent", found=f"sound, but not for here: {reasons[0]}")
    if reasons:
        return Finding(name=name, status="broken", found="; ".join(reasons), mend=mend)
    return Finding(name=name, status="ok", found="runs here")
