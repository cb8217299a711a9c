"""`comask-doctor`: what this machine can run, and whether a bundle is whole."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from comask import __version__
from comask.bundle import Bundle
from comask.errors import (
    BackendUnavailableError,
    BundleError,
    EngineError,
    KernelError,
    KernelUnavailableError,
)
from comask.evaluate import ap_text
from comask.runtime.gpu import find_gpu, find_gpu_or_reason
from comask.runtime.parity.judge import has_failed
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
KERNELS = ("pyramid_roi_align", "sorted_nms", "frame_to_canvas", "paste_masks")
EXTRAS = {  # of packages that nothing but one kind of work needs
    "av": "video", "trackers": "track", **dict.fromkeys(("ray", "pyarrow", "fsspec"), "fleet"),
}  # fmt: skip
FALLBACK_CAPABILITY = 80  # compiled for where there is no GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: of what was looked at.
        status: `ok`; `absent`, which is no fault unless it is wanted; `broken`, which is one.
        found: what there is, or why not.
        mend: the command or step that mends it; empty where there is nothing to mend.
    """

    name: str
    status: str
    found: str
    mend: str = ""


def diagnose() -> list[Finding]:
    """Looks at everything that comask can use on this machine; takes seconds."""
    looks: list[Callable[[], Finding]] = [
        _python, _comask, _gpu, _torch, _torchvision, _onnxruntime,
        lambda: _flavor("tensorrt"), lambda: _flavor("tensorrt-rtx"), _rtx_wheel, _pycuda,
        _host_kernels, _cuda_kernels, *(partial(_package, name) for name in EXTRAS),
    ]  # fmt: skip
    return [look() for look in looks]


def _python() -> Finding:
    found = (
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    )
    if sys.version_info[:2] > NEWEST_PYTHON:
        found += f"; comask is tested up to {'.'.join(map(str, NEWEST_PYTHON))}"
    return Finding(name="python", status="ok", found=found)


def _comask() -> Finding:
    return Finding(name="comask", status="ok", found=__version__)


def _gpu() -> Finding:
    gpu, reason = find_gpu_or_reason()
    if gpu is None:
        has_driver = shutil.which("nvidia-smi") is not None
        mend = (
            "nvidia-smi tells more"
            if has_driver
            else "if there is an NVIDIA GPU, install its driver"
        )
        return Finding(name="gpu", status="absent", found=reason, mend=mend)
    found = (
        f"{gpu.name}, sm{gpu.capability}, {gpu.memory / 2**30:.0f} GiB, driver for CUDA "
        f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
    )
    return Finding(name="gpu", status="ok", found=found)


def _torch() -> Finding:
    mend = "pip install 'comask[train]'"
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        return Finding(name="torch", status="absent", found="not installed", mend=mend)
    except (ImportError, OSError) as error:
        return _broken("torch", error, "pip install --force-reinstall 'comask[train]'")
    found = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if find_gpu_or_reason()[0] is not None and not torch.cuda.is_available():
        return Finding(
            name="torch",
            status="broken",
            found=f"{found}; it does not see the GPU",
            mend="install a torch built for this driver's CUDA, or a newer driver",
        )
    return Finding(name="torch", status="ok", found=found)


def _torchvision() -> Finding:
    try:
        torchvision = importlib.import_module("torchvision")
    except ModuleNotFoundError:
        mend = "pip install 'comask[train]'"
        return Finding(name="torchvision", status="absent", found="not installed", mend=mend)
    except (ImportError, OSError, RuntimeError) as error:
        # RuntimeError: its operators do not fit the torch beside it
        mend = "pip install --upgrade torch torchvision (a matching pair; torch 2.13 has none)"
        return _broken("torchvision", error, mend)
    return Finding(name="torchvision", status="ok", found=torchvision.__version__)


def _onnxruntime() -> Finding:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        mend = "pip install 'comask[ort]'"
        return Finding(name="onnxruntime", status="absent", found="not installed", mend=mend)
    except (ImportError, OSError) as error:
        return _broken("onnxruntime", error, "pip install --force-reinstall onnxruntime")
    providers = onnxruntime.get_available_providers()
    short = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
    found = f"{onnxruntime.__version__}: {short}"
    if find_gpu_or_reason()[0] is not None and "CUDAExecutionProvider" not in providers:
        mend = "for the GPU: pip uninstall onnxruntime; pip install onnxruntime-gpu"
        return Finding(name="onnxruntime", status="ok", found=found, mend=mend)
    return Finding(name="onnxruntime", status="ok", found=found)


def _flavor(name: str) -> Finding:
    try:
        importlib.metadata.version(PACKAGES[name])
        installed = True
    except importlib.metadata.PackageNotFoundError:
        installed = importlib.util.find_spec(MODULES[name]) is not None
    mend = f"pip install {PACKAGES[name]}"
    try:
        flavor = load_flavor(name)
    except BackendUnavailableError as error:
        if not installed:
            return Finding(name=name, status="absent", found="not installed", mend=mend)
        return Finding(
            name=name,
            status="broken",
            found=str(error.__cause__ or error),
            mend=f"pip install --force-reinstall {PACKAGES[name]}",
        )
    return Finding(name=name, status="ok", found=flavor.version)


def _rtx_wheel() -> Finding:
    """The missing link of `rtx_wheel.py`; our own builds work without it."""
    library = wheel_library()
    name = "tensorrt-rtx plugins"
    if library is None:
        return Finding(name=name, status="ok", found="nothing in their way")
    found = (
        f"comask's builds make up for {LIBRARY}, which the wheel lacks; for other programs: "
        f"ln -s {library.name} {library.parent / LIBRARY}"
    )
    return Finding(name=name, status="ok", found=found)


def _pycuda() -> Finding:
    mend = (
        "pip install 'comask[gpu]' (compiles for a minute or two; needs g++ and the CUDA toolkit)"
    )
    try:
        version = importlib.metadata.version("pycuda")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name="pycuda", status="absent", found="not installed", mend=mend)
    try:
        importlib.import_module("pycuda.driver")
    except (ImportError, OSError) as error:
        if "libcuda" in str(error):
            found = f"{version}, waits for a driver ({error})"
            return Finding(name="pycuda", status="absent", found=found, mend="see gpu")
        return _broken("pycuda", error, "pip install --force-reinstall --no-cache-dir pycuda")
    return Finding(name="pycuda", status="ok", found=version)


def _host_kernels() -> Finding:
    from comask.kernels.compile import host_library

    name = "kernels for the CPU"
    try:
        for source in KERNELS:
            host_library(source)
    except KernelUnavailableError as error:
        found = f"PyTorch falls back to torchvision's operators: {' '.join(str(error).split())}"
        return Finding(name=name, status="absent", found=found, mend="install g++, or set $CXX")
    except KernelError as error:
        return _broken(name, error, "set $CXX to another compiler")
    return Finding(name=name, status="ok", found="compile")


def _cuda_kernels() -> Finding:
    from comask.kernels.compile import cubin

    gpu, _ = find_gpu_or_reason()
    capability = gpu.capability if gpu else FALLBACK_CAPABILITY
    name = "kernels for the GPU"
    try:
        for source in KERNELS:
            cubin(source, capability)
    except KernelError as error:
        mend = "pip install 'comask[gpu]', or put the CUDA toolkit's nvcc on PATH"
        found = " ".join(str(error).split())
        return Finding(name=name, status="broken" if gpu else "absent", found=found, mend=mend)
    where = "" if gpu else ", as a trial: there is no GPU"
    return Finding(name=name, status="ok", found=f"compile for sm{capability}{where}")


def _package(name: str) -> Finding:
    """Whether a package is there; those that take seconds to import are not."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        mend = f"pip install 'comask[{EXTRAS[name]}]'"
        return Finding(name=name, status="absent", found="not installed", mend=mend)
    return Finding(name=name, status="ok", found=version)


def _broken(name: str, error: Exception, mend: str) -> Finding:
    return Finding(name=name, status="broken", found=" ".join(str(error).split()), mend=mend)


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
                text = f"{what} AP {ap_text(ap)}"
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
