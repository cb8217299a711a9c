"""Chooses and opens the backends of a bundle that are compared."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from comask.bundle import Bundle
from comask.errors import BackendUnavailableError, ComaskError, EngineError, KernelError
from comask.runtime.backends.names import BACKENDS
from comask.runtime.predictor import Predictor
from comask.runtime.trt.engine_folder import find_engines

ROUNDING = ("fp32", "fp16", "bf16", "int8")  # from the least to the most


def default_backends(bundle: Bundle) -> tuple[list[str], list[str]]:
    """Returns the backends that must run, PyTorch and ONNX Runtime in every precision, and the others.

    The first backend is the reference. Of the others, OpenVINO's and the engines, those that do not run
    here are left out.
    """
    graphs = [_name("onnxruntime", precision) for precision in bundle.manifest.precisions]
    infos = [engines.info for engines in find_engines(bundle)]
    engines = [_name(info.flavor, info.precision) for info in infos]
    return ["torch", *graphs], list(dict.fromkeys([*openvino_backends(bundle), *engines]))


def openvino_backends(bundle: Bundle) -> list[str]:
    """Returns OpenVINO's backends for which the bundle has graphs; none where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return []
    graphs = BACKENDS["openvino"].graphs
    return [
        _name("openvino", precision)
        for precision, needed in graphs.items()
        if needed in bundle.manifest.precisions
    ]


def open_backends(
    required: Sequence[str],
    optional: Sequence[str],
    load: Callable[[str], Predictor],
    stack: ExitStack,
) -> tuple[dict[str, Predictor], dict[str, str]]:
    """Opens all backends, so that errors come before the first is scored, which may take hours.

    Args:
        required: names of backends that must open.
        optional: names of backends that may be left out.
        load: opens one backend.
        stack: closes the backends.

    Returns:
        predictors by name, and the reasons why others were skipped, by name.

    Raises:
        ComaskError: if a required backend does not open.
    """
    opened: dict[str, Predictor] = {}
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(required):
        opened[name] = stack.enter_context(load(name))
    for name in optional:
        try:
            opened[name] = stack.enter_context(load(name))
        except (BackendUnavailableError, EngineError, KernelError) as error:
            skipped[name] = str(error)
    for name in opened:
        if name.partition(":")[0] == "torch":
            _make_reference(opened[name])
    return opened, skipped


def precision_of(name: str) -> str:
    """Returns the precision in a backend's name, `fp16` for `onnxruntime:fp16`; fp32 without one."""
    return name.partition(":")[2] or "fp32"


def looser(a: str, b: str) -> str:
    """Returns the precision of two whose tolerance their comparison takes."""
    known = [ROUNDING.index(precision) for precision in (a, b) if precision in ROUNDING]
    if len(known) < 2:
        raise ComaskError(f"precisions {a} and {b}: expected two of {', '.join(ROUNDING)}")
    return ROUNDING[max(known)]


def _name(backend: str, precision: str) -> str:
    return backend if precision == "fp32" else f"{backend}:{precision}"


def _make_reference(predictor: Predictor) -> None:
    """Makes PyTorch, the reference, return the coarse masks, too, and compute f32 in full on a GPU."""
    import torch

    from comask.runtime.backends.pytorch import TorchStage

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    stage1 = predictor.stages.stage1
    assert isinstance(stage1, TorchStage)
    stage2 = TorchStage(stage1.model, "stage2", bf16=stage1.bf16, diagnostics=True)
    predictor.stages = dataclasses.replace(predictor.stages, stage2=stage2)
