"""Opening a backend by its name: `torch`, `onnxruntime`, `tensorrt:fp16`, …, or `auto`."""

from __future__ import annotations

import logging
from typing import Literal

from comask.runtime.session import Stages

from comask.bundle import Bundle
from comask.errors import (
    BackendUnavailableError,
    BundleError,
    ComaskError,
    EngineError,
    KernelError,
)

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime", "torch")  # by falling speed

OnMismatch = Literal["error", "rebuild"]

logger = logging.getLogger(__name__)


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


def open_stages(
    bundle: Bundle, backend: str, *, device: int = 0, on_mismatch: OnMismatch = "error"
) -> Stages:
    """Both stages of a bundle on a backend.

    Args:
        bundle: to run.
        backend: see `parse_backend`; `auto` takes the fastest that runs here and logs why. It takes
            TensorRT in the lowest precision that there are engines of, the others in fp32.
        device: index of the GPU, for a backend that uses one.
        on_mismatch: whether engines that do not fit are an error or built again.

    Raises:
        BackendUnavailableError: when its packages are not installed, or what else it needs is missing.
        BundleError: when the bundle does not hold what it needs.
        EngineError: when engines do not fit, or cannot be opened or built.
    """
    if not isinstance(device, int) or device < 0:
        raise ComaskError(f"device {device!r}: expected the index of a GPU, 0 for the first")
    if backend == "auto":
        return _open_best(bundle, device, on_mismatch)
    name, precision = parse_backend(backend)
    if precision not in bundle.manifest.precisions:
        raise BundleError(
            f"{bundle.folder}: holds no {precision} graphs, only "
            f"{', '.join(bundle.manifest.precisions)}"
        )
    return _open(bundle, name, precision, device, on_mismatch)


def _open(
    bundle: Bundle, name: str, precision: str | None, device: int, on_mismatch: OnMismatch
) -> Stages:
    """`precision` None: the fastest where there is a choice, else fp32."""
    if name.startswith("tensorrt"):
        from comask.runtime.trt.session import trt_stages

        return trt_stages(bundle, name, precision, device=device, on_mismatch=on_mismatch)
    precision = precision or "fp32"
    if name == "onnxruntime":
        from comask.runtime.ort_session import ort_stages

        return ort_stages(bundle, precision, device)
    if precision != "fp32":
        raise BundleError(f"the torch backend runs fp32 weights only, {precision} was asked for")
    return _torch_stages(bundle, device)


def _open_best(bundle: Bundle, device: int, on_mismatch: OnMismatch) -> Stages:
    for name in BACKENDS:
        try:
            stages = _open(bundle, name, None, device, on_mismatch)
        except BackendUnavailableError as error:
            logger.info("backend auto: not %s: %s", name, error)
        except (EngineError, KernelError) as error:
            # somebody built these engines to have them run
            logger.warning("backend auto: not %s, slower ones follow: %s", name, error)
        else:
            logger.info("backend auto: taking %s, the fastest that runs here", stages.backend)
            return stages
    raise BackendUnavailableError(
        "no backend is installed: pip install 'comask[ort]' (ONNX Runtime) or 'comask[train]' (PyTorch)"
    )


def _torch_stages(bundle: Bundle, device: int) -> Stages:
    try:
        import torch
        from comask.runtime.torch_session import model_from_bundle, torch_stages
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"the torch backend cannot be imported ({error}): pip install 'comask[train]'"
        ) from error
    place = f"cuda:{device}" if torch.cuda.is_available() else "cpu"
    return torch_stages(model_from_bundle(bundle).to(place))
