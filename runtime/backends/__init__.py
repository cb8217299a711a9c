"""Opening a backend by its name: `torch`, `onnxruntime`, `tensorrt:fp16`, …, or `auto`."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import shlex
from dataclasses import dataclass
from typing import Literal

from comask.bundle import PRECISIONS, Bundle
from comask.config import require_count
from comask.errors import (
    BackendUnavailableError,
    BundleError,
    ComaskError,
    ConfigError,
    EngineError,
    KernelError,
)
from comask.runtime.backends.base import Stages
from comask.runtime.device import find_gpu

# The module of each backend and the extra that installs it, by falling speed. Its function
# `open_backend(bundle, name, precision, options)` gives `Stages`, in the fastest precision there is, or
# fp32, where `precision` is None. A new backend is a module beside `ort.py`, the one to copy, and a line.
MODULES = {
    "tensorrt": ("comask.runtime.backends.trt", "gpu"),
    "tensorrt-rtx": ("comask.runtime.backends.trt", "gpu"),
    "onnxruntime": ("comask.runtime.backends.ort", "ort"),
    "torch": ("comask.runtime.backends.pytorch", "train"),
}
BACKENDS = tuple(MODULES)

OnMismatch = Literal["error", "rebuild"]
Device = int | Literal["cpu"] | None

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Where and how large a bundle runs.

    Attributes:
        device: index of the GPU, or `cpu`; None for the first GPU where the backend can use one.
        on_mismatch: what happens when TensorRT engines do not fit this machine or bundle: `error`, or
            `rebuild`, which builds them again first.
        max_batch: images of one canvas that run together.
        proposals: stage 2 takes so many of the best proposals of an image; None for all of the bundle's.
        short_side: images are resized to this, in pixels; None for the bundle's.
    """

    device: Device = None
    on_mismatch: OnMismatch = "error"
    max_batch: int = 8
    proposals: int | None = None
    short_side: int | None = None


def parse_backend(text: str) -> tuple[str, str]:
    """`onnxruntime:int8` → (`onnxruntime`, `int8`); the precision is fp32 where none is named.

    Raises:
        ComaskError: for an unknown backend.
    """
    name, _, precision = text.partition(":")
    if name not in BACKENDS:
        raise ComaskError(
            f"unknown backend {name}: expected one of {', '.join(BACKENDS)}, with a precision of the "
            f"bundle behind a colon where it has several (onnxruntime:fp32)"
        )
    return name, precision or "fp32"


def require_precision(bundle: Bundle, precision: str) -> None:
    """Refuses a precision that a bundle has no graphs of.

    Raises:
        BundleError: saying how to add them.
    """
    if precision not in (there := bundle.manifest.precisions):
        mend = (
            f"; comask-export {shlex.quote(str(bundle.folder))} --precision {precision} adds them"
        )
        raise BundleError(
            f"{bundle.folder}: holds no {precision} graphs, only {', '.join(there)}"
            f"{mend if precision in PRECISIONS else ''}"
        )


def open_stages(bundle: Bundle, backend: str, options: LoadOptions | None = None) -> Stages:
    """Both stages of a bundle on a backend.

    Args:
        bundle: to run.
        backend: see `parse_backend`; `auto` takes the fastest that runs here and logs why. It takes
            TensorRT in the lowest precision that there are engines of, the others in fp32.
        options: where and how it runs; the defaults without it.

    Raises:
        BackendUnavailableError: when its packages are not installed, or what else it needs is missing.
        BundleError: when the bundle does not hold what it needs.
        ConfigError: when `device` is none, or there are not so many proposals.
        EngineError: when engines do not fit, or cannot be opened or built.
    """
    options = options or LoadOptions()
    device, proposals = options.device, options.proposals
    index = isinstance(device, int) and not isinstance(device, bool) and device >= 0
    if device not in (None, "cpu") and not index:
        raise ConfigError(
            f"device: expected the index of a GPU, 0 for the first, or cpu, got {device!r}"
        )
    if proposals is not None:
        require_count("proposals", proposals, bundle.manifest.model.proposals)
    if backend == "auto":
        return _open_best(bundle, options)
    name, precision = parse_backend(backend)
    require_precision(bundle, precision)
    return _open(bundle, name, precision, options)


def _open(bundle: Bundle, name: str, precision: str | None, options: LoadOptions) -> Stages:
    """`precision` None: the fastest where there is a choice, else fp32."""
    module, extra = MODULES[name]
    try:
        opener = importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"the {name} backend cannot be imported ({error}): pip install 'comask[{extra}]'"
        ) from error
    stages: Stages = opener.open_backend(bundle, name, precision, options)
    return dataclasses.replace(stages, proposals=options.proposals)


def _open_best(bundle: Bundle, options: LoadOptions) -> Stages:
    reasons = []
    for name in BACKENDS:
        try:
            stages = _open(bundle, name, None, options)
        except BackendUnavailableError as error:
            logger.info("backend auto: not %s: %s", name, error)
            reasons.append(f"{name}: {error}")
        except (EngineError, KernelError) as error:
            # somebody built these engines to have them run
            logger.warning("backend auto: not %s, slower ones follow: %s", name, error)
            reasons.append(f"{name}: {error}")
        else:
            logger.info("backend auto: taking %s, the fastest that runs here", stages.backend)
            return stages
    if isinstance(options.device, int) and find_gpu(options.device) is None:
        raise BackendUnavailableError(
            f"there is no GPU {options.device} here; leave the device out"
        )
    raise BackendUnavailableError(f"no backend runs here; {'; '.join(reasons)}")
