"""Opens a backend by its name: `torch`, `onnxruntime`, `tensorrt:fp16`, …, or `auto`."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from comask.bundle import Bundle
from comask.config import TILE_OVERLAP, require_count
from comask.errors import (
    BackendUnavailableError,
    BundleError,
    ConfigError,
    EngineError,
    KernelError,
)
from comask.runtime.backends.base import Stages
from comask.runtime.backends.choice import candidates
from comask.runtime.backends.names import BACKENDS, Device, graph_precision, parse_backend
from comask.runtime.gpu import find_gpu

OnMismatch = Literal["error", "rebuild"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The options with which a bundle is loaded.

    Attributes:
        device: index of the GPU, `gpu` for the first, `cpu`, or `npu` for OpenVINO; None for the first
            GPU if the backend can use NVIDIA's, else for the processor.
        on_mismatch: the reaction to TensorRT engines that do not fit this machine or bundle: `error`, or
            `rebuild`, which builds them again first.
        max_batch: the number of images of one canvas that run together.
        proposals: the number of an image's best proposals that stage 2 takes; None for all.
        short_side: length in pixels to which an image's shorter side is resized; None for the bundle's.
        tile: see `comask.runtime.views.Views`, as for `tile_overlap` and `tta`. A `Predictor` takes them;
            the stages are the same.
    """

    device: Device = None
    on_mismatch: OnMismatch = "error"
    max_batch: int = 8
    proposals: int | None = None
    short_side: int | None = None
    tile: int | None = None
    tile_overlap: float = TILE_OVERLAP
    tta: Sequence[str] = ()

    def views(self) -> dict[str, Any]:
        """Returns `tile`, `tile_overlap` and `tta` (flip,scale) as records name them, None if unused."""
        overlap = None if self.tile is None else self.tile_overlap
        return {"tile": self.tile, "tile_overlap": overlap, "tta": ",".join(self.tta) or None}


def require_precision(bundle: Bundle, name: str, precision: str) -> None:
    """Checks that a bundle has the graphs that a backend reads to compute in a precision.

    Raises:
        BundleError: if it does not have them, and the text says how to add them; or if the backend does
            not compute in that precision.
    """
    existing, needed = bundle.manifest.precisions, graph_precision(name, precision)
    if needed not in existing:
        folder = shlex.quote(str(bundle.folder))
        fix = f"comask export {folder} --precision {needed} adds them"
        if needed == "int8":
            fix = f"comask quantize {folder} --calib-data DIR adds them"
        raise BundleError(
            f"{bundle.folder}: holds no {needed} graphs, only {', '.join(existing)}; {fix}"
        )


def open_stages(bundle: Bundle, backend: str, options: LoadOptions | None = None) -> Stages:
    """Opens both stages of a bundle on a backend.

    Args:
        bundle: the bundle to run.
        backend: see `parse_backend`; `auto` takes the fastest that runs here and logs why, see
            `comask.runtime.backends.choice`.
        options: the load options; None for the defaults.

    Raises:
        BackendUnavailableError: if packages, or something else that the backend needs, are missing.
        BundleError: if the bundle lacks what the backend needs.
        ConfigError: if `device` is invalid, or the bundle has fewer proposals.
        EngineError: if engines do not fit, or cannot be opened or built.
    """
    options = options or LoadOptions()
    device, proposals = options.device, options.proposals
    index = isinstance(device, int) and not isinstance(device, bool) and device >= 0
    if device not in (None, "cpu", "gpu", "npu") and not index:
        raise ConfigError(
            f"device: expected the index of a GPU, 0 for the first, or cpu, gpu or npu, got {device!r}"
        )
    if proposals is not None:
        require_count("proposals", proposals, bundle.manifest.model.proposals)
    if backend == "auto":
        return _open_best(bundle, options)
    name, precision = parse_backend(backend)
    require_precision(bundle, name, precision)
    return _open(bundle, name, precision, options)


def _open(bundle: Bundle, name: str, precision: str | None, options: LoadOptions) -> Stages:
    """Opens one backend; `precision` None takes the fastest if the backend has several, else fp32."""
    backend = BACKENDS[name]
    try:
        opener = importlib.import_module(backend.module)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"the {name} backend cannot be imported ({error}): pip install 'comask[{backend.extra}]'"
        ) from error
    stages: Stages = opener.open_backend(bundle, name, precision, options)
    return dataclasses.replace(stages, proposals=options.proposals)


def _open_best(bundle: Bundle, options: LoadOptions) -> Stages:
    reasons = []
    for candidate in candidates(bundle, options.device):
        name, precision = parse_backend(candidate)
        given = precision if ":" in candidate else None
        try:
            stages = _open(bundle, name, given, options)
        except BackendUnavailableError as error:
            logger.info("backend auto: not %s: %s", name, error)
            reasons.append(f"{name}: {error}")
        except (EngineError, KernelError) as error:
            # a warning, because somebody built these engines to run them
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
