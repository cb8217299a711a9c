"""Diagnoses what this machine can run and whether a bundle is intact, for `comask doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from comask import __version__
from comask.bundle import Bundle
from comask.errors import (
    BackendUnavailableError,
    BundleError,
    EngineError,
    KernelError,
    KernelUnavailableError,
    one_line,
)
from comask.evaluate import ap_text
from comask.kernels.compile import gpu_module, host_library
from comask.kernels.launch import FRAME, MASKS, NMS, ROI_ALIGN
from comask.runtime.device import find_gpu, find_gpu_or_reason
from comask.runtime.trt.engine import LIBRARY, MODULES, PACKAGES, load_flavor, wheel_library
from comask.runtime.trt.engine_folder import (
    ENGINES,
    PLANS,
    EngineFolder,
    rebuild_command,
    why_not_on,
)
from comask.runtime.trt.ops import kernels_sha256

NEWEST_PYTHON = (3, 13)
KERNELS = (ROI_ALIGN, NMS, FRAME, MASKS)
FALLBACK_CAPABILITY = 80  # what the kernels are compiled for on a machine without a GPU

Status = Literal["ok", "absent", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: the subject of the check.
        status: `ok`; `absent`, which is a fault only if it is needed; `broken`, which always is one.
        found: the version or state that was found, or why it is missing.
        fix: the command or step that fixes it; empty if nothing is wrong.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


class _Advice(Exception):  # noqa: N818, not always an error
    """Raised by a check whose finding the user can do something about; see `Finding`."""

    def __init__(self, status: Status, found: object, fix: str) -> None:
        self.status, self.found, self.fix = status, one_line(found), fix


def _finding(name: str, check: Callable[[], str]) -> Finding:
    """Runs a check, which returns what it found if all is well and raises `_Advice` otherwise."""
    try:
        return Finding(name=name, status="ok", found=check())
    except _Advice as advice:
        return Finding(name=name, status=advice.status, found=advice.found, fix=advice.fix)


def diagnose() -> list[Finding]:
    """Checks everything that comask can use on this machine, which takes seconds."""
    return [_finding(name, check) for name, check in _CHECKS.items()]


def _version(package: str, install: str) -> str:
    """Returns the version of an installed package without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise _Advice("absent", "not installed", install) from error


def _module(name: str, install: str, reinstall: str) -> Any:
    """Imports a module.

    Args:
        name: the module's name.
        install: pip's arguments that install a missing module.
        reinstall: pip's arguments that repair a broken module.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _Advice("absent", "not installed", f"pip install {install}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise _Advice("broken", error, f"pip install {reinstall}") from error


def _python() -> str:
    here = f"{platform.system()} {platform.machine()}, {sys.executable}"
    found = f"{platform.python_version()} on {here}"
    if sys.version_info[:2] > NEWEST_PYTHON:
        found += f"; comask is tested up to {'.'.join(map(str, NEWEST_PYTHON))}"
    return found


def _gpu() -> str:
    gpu, reason = find_gpu_or_reason()
    if gpu is None:
        fix = "if there is an NVIDIA GPU, install its driver"
        if shutil.which("nvidia-smi") is not None:
            fix = "run nvidia-smi, which tells more"
        raise _Advice("absent", reason, fix)
    return (
        f"{gpu.name}, sm{gpu.capability}, {gpu.memory / 2**30:.0f} GiB, driver for CUDA "
        f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
    )


def _torch() -> str:
    torch = _module("torch", "'comask[train]'", "--force-reinstall 'comask[train]'")
    found = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if find_gpu() is not None and not torch.cuda.is_available():
        fix = "install a torch built for this driver's CUDA, or a newer driver"
        raise _Advice("broken", f"{found}; it does not see the GPU", fix)
    return found


def _torchvision() -> str:
    # torchvision raises RuntimeError if its operators do not fit the installed torch
    pair = "--upgrade torch torchvision (a matching pair; torch 2.13 has none)"
    version: str = _module("torchvision", "'comask[train]'", pair).__version__
    return version


def _onnxruntime() -> str:
    module = _module("onnxruntime", "'comask[ort]'", "--force-reinstall onnxruntime")
    providers = module.get_available_providers()
    short = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
    found = f"{module.__version__}: {short}"
    if find_gpu() is not None and "CUDAExecutionProvider" not in providers:
        fix = "for the GPU: pip uninstall onnxruntime; pip install onnxruntime-gpu"
        raise _Advice("ok", found, fix)
    return found


def _flavor(name: str) -> str:
    try:
        return load_flavor(name).version
    except BackendUnavailableError as error:
        install = f"pip install {PACKAGES[name]}"
        if importlib.util.find_spec(MODULES[name]) is None:
            _version(PACKAGES[name], install)
        reinstall = f"pip install --force-reinstall {PACKAGES[name]}"
        raise _Advice("broken", error.__cause__ or error, reinstall) from error


def _rtx_wheel() -> str:
    """Names the link that other programs need; comask's builds make it themselves (`wheel_library`)."""
    library = wheel_library()
    if library is None:
        return "work"
    return (
        f"the wheel lacks {LIBRARY}; comask's builds work without it, other programs need: "
        f"ln -s {library.name} {library.parent / LIBRARY}"
    )


def _pycuda() -> str:
    version = _version(
        "pycuda",
        "pip install 'comask[gpu]' (compiles for a minute or two; needs g++ and the CUDA toolkit)",
    )
    try:
        importlib.import_module("pycuda.driver")
    except (ImportError, OSError) as error:
        if "libcuda" in str(error):
            found = f"{version}, but NVIDIA's driver is missing ({error})"
            raise _Advice("absent", found, "see the line of the gpu") from error
        reinstall = "pip install --force-reinstall --no-cache-dir pycuda"
        raise _Advice("broken", error, reinstall) from error
    return version


def _host_kernels() -> str:
    try:
        for source in KERNELS:
            host_library(source)
    except KernelUnavailableError as error:
        found = f"PyTorch falls back to torchvision's operators: {error}"
        raise _Advice("absent", found, "install g++, or set $CXX") from error
    except KernelError as error:
        raise _Advice("broken", error, "set $CXX to another compiler") from error
    return "compile"


def _cuda_kernels() -> str:
    gpu = find_gpu()
    capability = gpu.capability if gpu else FALLBACK_CAPABILITY
    try:
        for source in KERNELS:
            gpu_module(source, capability)
    except KernelError as error:
        fix = "pip install 'comask[gpu]', or put the CUDA toolkit's nvcc on PATH"
        raise _Advice("broken" if gpu else "absent", error, fix) from error
    return f"compile for sm{capability}{'' if gpu else ' (a trial: this machine has no GPU)'}"


def _extra(package: str, extra: str) -> str:
    """Returns the version of a package that an extra brings and that takes seconds to import."""
    return _version(package, f"pip install 'comask[{extra}]'")


_CHECKS: Mapping[str, Callable[[], str]] = {
    "python": _python,
    "comask": lambda: __version__,
    "gpu": _gpu,
    "torch": _torch,
    "torchvision": _torchvision,
    "onnxruntime": _onnxruntime,
    "tensorrt": partial(_flavor, "tensorrt"),
    "tensorrt-rtx": partial(_flavor, "tensorrt-rtx"),
    "tensorrt-rtx plugins": _rtx_wheel,
    "pycuda": _pycuda,
    "kernels for the CPU": _host_kernels,
    "kernels for the GPU": _cuda_kernels,
    "av": partial(_extra, "av", "video"),
    "trackers": partial(_extra, "trackers", "track"),
    "ray": partial(_extra, "ray", "jobs"),
    "pyarrow": partial(_extra, "pyarrow", "jobs"),
    "fsspec": partial(_extra, "fsspec", "jobs"),
}


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
    findings = [_finding(name, partial(_file, bundle, name)) for name in bundle.manifest.files]
    found = f"all {len(findings)} have the manifest's hashes"
    broken = [finding for finding in findings if finding.status != "ok"]
    return broken or [Finding(name="bundle's files", status="ok", found=found)]


def _file(bundle: Bundle, name: str) -> str:
    try:
        return str(bundle.file(name))
    except BundleError as error:
        fix = "export the checkpoint again, or copy the bundle again from an intact one"
        raise _Advice("broken", error, fix) from error


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
        latest |= {name: _finding(name, check) for name, check in checks.items()}
    return list(latest.values())


def _not_judged(entry: Mapping[str, Any]) -> str:
    raise _Advice("absent", "nothing was compared", entry["not_judged"])


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
        raise _Advice("broken", f"{found}: FAILED", f"{page} names what differs")
    return f"{found}: {'passed' if compared else 'reference'}"


def _engines(bundle: Bundle) -> list[Finding]:
    folder = bundle.folder / ENGINES
    if folder.exists() and not folder.is_dir():
        fix = f"rm {folder}: comask build makes a folder of that name"
        return [Finding(name=ENGINES, status="broken", found="is not a folder", fix=fix)]
    folders = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    return [_finding(f"{ENGINES}/{path.name}", partial(_engine, bundle, path)) for path in folders]


def _engine(bundle: Bundle, path: Path) -> str:
    try:
        engines = EngineFolder.open(path)
        for stage in PLANS:
            engines.plan(stage)
    except EngineError as error:
        fix = f"rm -r {path}, and build it again: comask build {bundle.folder} --engine …"
        raise _Advice("broken", error, fix) from error
    try:
        version = load_flavor(engines.info.flavor).version
    except BackendUnavailableError as error:
        raise _Advice("absent", error, "") from error
    gpu = find_gpu()
    reasons = engines.mismatches(bundle, version, gpu, kernels_sha256())
    if reasons == [why_not_on(engines.info, gpu)]:
        raise _Advice("absent", f"intact, but not for this machine: {reasons[0]}", "")
    if reasons:
        raise _Advice("broken", "; ".join(reasons), rebuild_command(engines))
    return "runs on this machine"
