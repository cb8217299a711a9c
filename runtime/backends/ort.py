"""The ONNX Runtime backend: runs the bundle's graphs unchanged, the custom ops by their function bodies.

It is the simplest backend and a good template for another one: a stage with `inputs`, `outputs`, `run`
and `close`, and `open_backend`, which `comask.runtime.backends.MODULES` names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comask.bundle import STAGES, Bundle
from comask.errors import BackendUnavailableError, BundleError, EngineError, is_out_of_memory
from comask.runtime.backends import Device, LoadOptions
from comask.runtime.backends.base import Array, Stages, TensorSpec
from comask.runtime.backends.ort_install import (
    import_onnxruntime,
    load_cuda_libraries,
    reinstall,
    why_cuda_fails,
)

if TYPE_CHECKING:
    import onnxruntime

CUDA_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}

logger = logging.getLogger(__name__)


class OrtSession:
    """An ONNX file in ONNX Runtime, on CUDA if its build and the machine offer it.

    On CUDA, f32 keeps its precision: TensorFloat-32, with a mantissa of ten bits as f16's, is off.

    Args:
        graph: path of the file, or its bytes.
        device: index of the GPU, or `cpu`; None for the first GPU if CUDA can be used.
        optimized: whether ONNX Runtime may rewrite the graph. That is faster, but it changes the
            results of Q/DQ graphs on a CPU.

    Attributes:
        provider: the provider that runs it, `CUDAExecutionProvider` or `CPUExecutionProvider`.

    Raises:
        BackendUnavailableError: if onnxruntime is not installed, or cannot use the requested GPU.
        BundleError: if ONNX Runtime cannot load the file.
    """

    def __init__(
        self,
        graph: Path | bytes,
        device: Device = None,
        *,
        optimized: bool = True,
    ) -> None:
        ort = import_onnxruntime()
        name = graph if isinstance(graph, Path) else "a graph in memory"
        model = str(graph) if isinstance(graph, Path) else graph
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only, which are raised as well
        # PyTorch obeys this variable, too; Ray sets it for its actors
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdecimal():
            options.intra_op_num_threads = int(threads)
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session, failure = _start(ort, model, options, device)
        # ONNX Runtime does not export its exceptions, whose only common base is Exception
        except Exception as error:
            if is_out_of_memory(error):
                raise EngineError(f"{name}: not enough memory to load it: {error}") from error
            raise BundleError(f"{name}: ONNX Runtime cannot load it: {error}") from error
        self._session: onnxruntime.InferenceSession | None = session
        self.provider: str = session.get_providers()[0]
        if isinstance(device, int) and self.provider != CUDA_PROVIDER:
            without = f"ONNX Runtime {ort.__version__} is built without it: {reinstall('gpu')}"
            raise BackendUnavailableError(
                f"the onnxruntime backend: GPU {device} was asked for, and CUDA cannot be used: "
                f"{failure or without}; or leave the device out"
            )
        if failure:
            logger.warning(
                "%s: ONNX Runtime takes %s; %s is in its build and was asked for, but does not start: %s",
                name, self.provider, CUDA_PROVIDER, failure,
            )  # fmt: skip
        self.inputs = tuple(_spec(entry) for entry in self._session.get_inputs())
        self.outputs = tuple(_spec(entry) for entry in self._session.get_outputs())
        self._dtypes = {spec.name: spec.dtype for spec in self.inputs}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the graph and returns its outputs by name; the arrays belong to the caller."""
        if self._session is None:
            raise RuntimeError("this session is closed")
        names = [spec.name for spec in self.outputs]
        cast = {
            name: np.ascontiguousarray(feeds[name], dtype=dtype)
            for name, dtype in self._dtypes.items()
        }
        return dict(zip(names, self._session.run(names, cast), strict=True))

    def close(self) -> None:
        """Frees the session; it cannot run afterwards."""
        self._session = None


def ort_stages(bundle: Bundle, precision: str, device: Device = None) -> Stages:
    """Opens both graphs of a bundle; `OrtSession` explains `device`.

    Raises:
        BackendUnavailableError: see `OrtSession`.
        BundleError: if a graph is missing, altered or broken.
    """
    stage1, stage2 = (
        OrtSession(bundle.graph(stage, precision), device, optimized=precision != "int8")
        for stage in STAGES
    )
    place = "cpu" if stage2.provider == CPU_PROVIDER else f"cuda:{device or 0}"
    return Stages(f"onnxruntime:{precision}", stage1, stage2, device=place)


def open_backend(bundle: Bundle, name: str, precision: str | None, options: LoadOptions) -> Stages:
    """Opens the bundle's graphs; see `comask.runtime.backends.MODULES`, and `ort_stages` for errors."""
    return ort_stages(bundle, precision or "fp32", options.device)


def _spec(entry: onnxruntime.NodeArg) -> TensorSpec:
    return TensorSpec(entry.name, np.dtype(NUMPY_TYPES[entry.type]), tuple(entry.shape))


def _start(
    ort: Any, model: str | bytes, options: Any, device: Device
) -> tuple[onnxruntime.InferenceSession, str]:
    """Starts a session; returns it, and why it is not on CUDA if that is in the build and wanted."""

    def on(*providers: tuple[str, dict[str, int]]) -> onnxruntime.InferenceSession:
        # its own fallback prints to standard output, where a command may write JSON
        return ort.InferenceSession(model, options, providers=list(providers), enable_fallback=0)

    cpu: tuple[str, dict[str, int]] = (CPU_PROVIDER, {})
    if device == "cpu" or CUDA_PROVIDER not in ort.get_available_providers():
        return on(cpu), ""
    load_cuda_libraries()
    raised = None
    try:
        session = on((CUDA_PROVIDER, {"device_id": device or 0, "use_tf32": 0}), cpu)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        session, raised = on(cpu), error  # a graph that is broken does not start there either
    if session.get_providers()[0] == CUDA_PROVIDER:
        return session, ""
    return session, why_cuda_fails(raised)
