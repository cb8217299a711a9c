"""Opening a backend by its name: `torch`, `onnxruntime`, `onnxruntime:fp16`, or `auto`."""

from __future__ import annotations

import importlib.util
import logging

from comask.runtime.session import Stages

from comask.bundle import WEIGHTS, Bundle
from comask.errors import BackendUnavailableError, BundleError, ComaskError

# by falling speed
BACKENDS = {"onnxruntime": "onnxruntime", "torch": "torch"}  # name → module that it needs

logger = logging.getLogger(__name__)


def parse_backend(text: str) -> tuple[str, str]:
    """`onnxruntime:int8` → (`onnxruntime`, `int8`); the precision is fp32 where none is named.

    Raises:
        ComaskError: for an unknown backend.
    """
    name, _, precision = text.partition(":")
    if name not in BACKENDS:
        raise ComaskError(
            f"unknown backend {name}: expected {', '.join(BACKENDS)} or auto, with a precision of "
            f"the bundle behind a colon where it has several (onnxruntime:fp32)"
        )
    return name, precision or "fp32"


def open_stages(bundle: Bundle, backend: str) -> Stages:
    """Both stages of a bundle on a backend.

    Args:
        bundle: to run.
        backend: see `parse_backend`; `auto` takes the fastest that is installed and logs why.

    Raises:
        BackendUnavailableError: when its packages are not installed.
        BundleError: when the bundle does not hold what it needs.
    """
    if backend == "auto":
        backend = _best_backend()
    name, precision = parse_backend(backend)
    if precision not in bundle.manifest.precisions:
        raise BundleError(
            f"{bundle.folder}: holds no {precision} graphs, only "
            f"{', '.join(bundle.manifest.precisions)}"
        )
    if name == "onnxruntime":
        from comask.runtime.ort_session import ort_stages

        return ort_stages(bundle, precision)
    if precision != "fp32":
        raise BundleError(f"the torch backend runs fp32 weights only, {precision} was asked for")
    return _torch_stages(bundle)


def _best_backend() -> str:
    missing: list[str] = []
    for name, module in BACKENDS.items():
        if importlib.util.find_spec(module):
            reason = f"; not installed: {', '.join(missing)}" if missing else ""
            logger.info("backend auto: taking %s, the fastest installed%s", name, reason)
            return name
        missing.append(name)
    raise BackendUnavailableError(
        "no backend is installed: pip install 'comask[ort]' (ONNX Runtime) or 'comask[train]' (PyTorch)"
    )


def _torch_stages(bundle: Bundle) -> Stages:
    try:
        import torch
        from comask.runtime.torch_session import torch_stages
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from comask.models.comask import CoMask
        from comask.training.checkpoint import load_weights
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"the torch backend cannot be imported ({error}): pip install 'comask[train]'"
        ) from error
    manifest = bundle.manifest
    model = CoMask(manifest.model, manifest.preprocess)
    try:
        load_weights(model, load_file(bundle.file(WEIGHTS)))
    except (SafetensorError, ComaskError) as error:
        raise BundleError(f"{bundle.folder / WEIGHTS}: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch_stages(model.to(device).eval())
