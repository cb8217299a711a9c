"""The ONNX Runtime backend: runs the bundle's graphs unchanged, the custom ops by their function bodies.

It is the simplest backend and a good template for another one: a stage with `inputs`, `outputs`, `run`
and `close`, and `open_backend`, which `comask.runtime.backends.names.BACKENDS` names.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from comask.bundle import STAGES, Bundle
from comask.errors import BackendUnavailableError, BundleError, EngineError, is_out_of_memory
from comask.kernels import run
from comask.kernels.launch import Launch
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.base import Array, Stages, TensorSpec
from comask.runtime.backends.names import NvidiaDevice, nvidia_device
from comask.runtime.backends.ort_install import (
    import_onnxruntime,
    load_cuda_libraries,
    reinstall,
    why_cuda_fails,
)
from comask.runtime.resident import with_kernels

if TYPE_CHECKING:
    import onnxruntime

CUDA_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
# Threads that have nothing to do keep a core busy in case work comes. After a run, that takes time from
# the other stage's threads, and in a run from other programs.
QUIET_THREADS = {"session.force_spinning_stop": "1", "session.intra_op.allow_spinning": "0"}
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
        gpu: index of the GPU that runs it; None for the CPU.
        keeps: whether outputs stay on the device if `run` may keep them; not on a CPU, where that takes
            five percent longer than arrays do.

    Raises:
        BackendUnavailableError: if onnxruntime is not installed, or cannot use the requested GPU.
        BundleError: if ONNX Runtime cannot load the file.
    """

    def __init__(
        self,
        graph: Path | bytes,
        device: NvidiaDevice = None,
        *,
        optimized: bool = True,
    ) -> None:
        ort = import_onnxruntime()
        name = graph if isinstance(graph, Path) else "a graph in memory"
        model = str(graph) if isinstance(graph, Path) else graph
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only, which are raised as well
        for entry, value in QUIET_THREADS.items():
            options.add_session_config_entry(entry, value)
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
        _return_freed_memory()
        self._session: onnxruntime.InferenceSession | None = session
        self.provider: str = session.get_providers()[0]
        on_gpu = self.provider == CUDA_PROVIDER
        self.gpu = (device if isinstance(device, int) else 0) if on_gpu else None
        self.keeps = on_gpu
        self._kept_type: Any = ort.OrtValue
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

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """Runs the graph; the outputs in `keep` are OrtValues on its device, the others arrays."""
        if self._session is None:
            raise RuntimeError("this session is closed")
        names = [spec.name for spec in self.outputs]
        kept = set(keep) & set(names) if self.keeps else set()
        resident = {n: feeds[n] for n in self._dtypes if isinstance(feeds[n], self._kept_type)}
        arrays = {
            name: np.ascontiguousarray(feeds[name], dtype=dtype)
            for name, dtype in self._dtypes.items()
            if name not in resident
        }
        if not kept and not resident:
            return dict(zip(names, self._session.run(names, arrays), strict=True))
        binding = self._session.io_binding()
        for name, value in resident.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name in names:
            binding.bind_output(name, *_place(self.gpu if name in kept else None))
        self._session.run_with_iobinding(binding)
        values = zip(names, binding.get_outputs(), strict=True)
        return {name: value if name in kept else value.numpy() for name, value in values}

    def close(self) -> None:
        """Frees the session; it cannot run afterwards."""
        self._session = None


class OrtMemory:
    """Allocates OrtValues on a session's device; see `comask.runtime.resident.Memory`.

    ONNX Runtime runs a graph on a stream of its own, and waits for it. Kernels run on the default stream
    and are waited for as well, so that both see each other's results.

    Args:
        gpu: index of the GPU; None for the host.
    """

    def __init__(self, gpu: int | None) -> None:
        self.gpu = gpu
        self._place = _place(gpu)
        self._value: Any = import_onnxruntime().OrtValue

    def prepare(self, source: str) -> None:
        """Compiles and loads a kernel."""
        run.prepare_on(source, self.gpu)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Allocates an OrtValue."""
        return self._value.ortvalue_from_shape_and_type(shape, np.dtype(dtype).type, *self._place)

    def from_host(self, array: Array) -> Any:
        """Copies an array to the device."""
        return self._value.ortvalue_from_numpy(np.ascontiguousarray(array), *self._place)

    def to_host(self, value: Any) -> Array:
        """Copies an OrtValue to the host."""
        return np.array(value.numpy())

    def address(self, value: Any) -> int:
        """Returns the address of an OrtValue's first byte."""
        return int(value.data_ptr())

    def launch(self, launch: Launch, inputs: Sequence[int], output: int) -> None:
        """Runs a kernel and waits for it."""
        if self.gpu is None:
            run.on_host(launch, inputs, output)
            return
        run.use_primary_context(self.gpu)
        run.on_gpu(launch, inputs, output, run.LEGACY_STREAM)
        run.synchronize(run.LEGACY_STREAM)

    @property
    def stream(self) -> int:
        """Handle of the default stream."""
        return run.LEGACY_STREAM

    def synchronize(self, stream: int) -> None:
        """Waits for the work that is now queued on a stream."""
        if self.gpu is not None:
            run.use_primary_context(self.gpu)
            run.synchronize(stream)


def ort_stages(bundle: Bundle, precision: str, device: NvidiaDevice = None) -> Stages:
    """Opens both graphs of a bundle; `OrtSession` explains `device`.

    Raises:
        BackendUnavailableError: see `OrtSession`.
        BundleError: if a graph is missing, altered or broken.
    """
    stage1, stage2 = (
        OrtSession(bundle.graph(stage, precision), device, optimized=precision != "int8")
        for stage in STAGES
    )
    gpus = {stage.gpu for stage in (stage1, stage2)}
    gpu = gpus.pop() if len(gpus) == 1 else None
    place = "cpu" if stage2.gpu is None else f"cuda:{stage2.gpu}"
    name = f"onnxruntime:{precision}"
    memory = None if gpu is None else with_kernels(OrtMemory(gpu), name)
    return Stages(name, stage1, stage2, device=place, memory=memory)


def open_backend(bundle: Bundle, name: str, precision: str | None, options: LoadOptions) -> Stages:
    """Opens the bundle's graphs; see `names.BACKENDS`, and `ort_stages` for errors."""
    return ort_stages(bundle, precision or "fp32", nvidia_device(name, options.device))


def _place(gpu: int | None) -> tuple[str, int]:
    """Returns a GPU, given by its index, or the host, as ONNX Runtime names devices."""
    return ("cpu", 0) if gpu is None else ("cuda", gpu)


def _spec(entry: onnxruntime.NodeArg) -> TensorSpec:
    return TensorSpec(entry.name, np.dtype(NUMPY_TYPES[entry.type]), tuple(entry.shape))


def _return_freed_memory() -> None:
    """Gives the system the memory of the file that was loaded, which glibc would keep (200 MiB)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _start(
    ort: Any, model: str | bytes, options: Any, device: NvidiaDevice
) -> tuple[onnxruntime.InferenceSession, str]:
    """Starts a session; returns it, and why it is not on CUDA if that is in the build and wanted."""

    def on(*providers: tuple[str, dict[str, int]]) -> onnxruntime.InferenceSession:
        # Plans of the memory of past shapes take a quarter of a CPU's peak, and no time without them.
        options.enable_mem_pattern = len(providers) > 1
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
