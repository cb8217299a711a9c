"""TensorRT engines: imports either flavor of the library, and loads plans with it."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from comask.errors import BackendUnavailableError, EngineError, UnsupportedGpuError
from comask.kernels.launch import LEVEL_STRIDES
from comask.runtime.backends.base import TensorSpec
from comask.runtime.trt.engine_folder import EngineFolder, widening_command
from comask.runtime.trt.graphs import Graphs
from comask.runtime.trt.memory_format import MemoryFormat

LIBRARY = "libtensorrt_rtx.so"

__all__ = ["load_flavor"]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # flavor → module
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
OLDEST = 10  # the first version with IPluginV3 and strong typing
KEPT_LINES = 50  # of TensorRT's log, for error messages
# reasons of `EngineInvalidityDiagnostics` that lie in the machine and not in the plan
MACHINE_REASONS = (
    "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY",
)  # fmt: skip
NO_DRIVER = "CUDA driver version is insufficient"

logger = logging.getLogger(__name__)

PROFILE = 0  # engines are built with a single profile
JIT_CACHE = "{stage}.jit.cache"  # file in the engine's folder

Shape = tuple[int, ...]


def wheel_library() -> Path | None:
    """Returns the wheel's library if its unversioned name is missing; None if nothing is missing."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return None  # TensorRT-RTX did not come as a wheel; the system's linker finds its library
    folder = Path(spec.origin).parent
    if (folder / LIBRARY).exists():  # the parser searches its own folder
        return None
    versioned = sorted(folder.glob(f"{LIBRARY}.*"))
    if not versioned or _loads(LIBRARY):
        return None
    return versioned[-1]


def search_path(folder: Path) -> str | None:
    """Returns the LD_LIBRARY_PATH that a new process needs to parse plugins; None if it needs none.

    Args:
        folder: an existing folder, in which the missing link is created.
    """
    library = wheel_library()
    if library is None:
        return None
    link = folder / LIBRARY
    if not link.is_symlink():
        link.symlink_to(library)
    rest = os.environ.get("LD_LIBRARY_PATH")
    return f"{folder}:{rest}" if rest else str(folder)


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class Flavor:
    """One imported TensorRT.

    Attributes:
        name: `tensorrt` or `tensorrt-rtx`.
        trt: the module.
        version: the module's version.
        log: TensorRT's `ILogger`; a process can have only one, so everything must use this one.
        lines: the latest warnings and errors, oldest first, each with whether it is an error.
        plugin_errors: errors that our plugins raised inside TensorRT, which drops them.
    """

    name: str
    trt: Any
    version: str
    log: Any
    lines: deque[tuple[bool, str]]
    plugin_errors: list[str]

    def errors(self) -> str:
        """Returns, in one line, what failed since `clear`: our plugins' errors, TensorRT's, or warnings.

        If several threads run engines, the line may contain errors of another thread.
        """
        lines = self.lines.copy()  # other threads log meanwhile
        errors = list(self.plugin_errors) or [text for is_error, text in lines if is_error]
        told = list(dict.fromkeys(errors or [text for _, text in lines]))
        # without a GPU every failing call logs this line as well
        told = [text for text in told if NO_DRIVER not in text] or told
        return "; ".join(told) or "it logged nothing"

    def clear(self) -> None:
        """Drops all logged lines and errors."""
        self.lines.clear()
        self.plugin_errors.clear()


@functools.cache
def load_flavor(name: str) -> Flavor:
    """Imports a flavor.

    Args:
        name: `tensorrt` or `tensorrt-rtx`.

    Raises:
        BackendUnavailableError: if it cannot be imported, or is older than 10.
    """
    # find_spec proves nothing: some installations have the bindings without the library
    try:
        trt: Any = importlib.import_module(MODULES[name])
        version = str(trt.__version__)
    except (ImportError, OSError, AttributeError) as error:
        raise BackendUnavailableError(
            f"{name} cannot be imported ({' '.join(str(error).split())}): "
            f"pip install {PACKAGES[name]}"
        ) from error
    if name == "tensorrt" and int(version.partition(".")[0]) < OLDEST:
        raise BackendUnavailableError(
            f"tensorrt {version} is too old: comask needs {OLDEST} or newer; "
            f"pip install --upgrade {PACKAGES[name]}"
        )
    lines: deque[tuple[bool, str]] = deque(maxlen=KEPT_LINES)
    return Flavor(name, trt, version, _new_log(trt, lines), lines, [])


def _new_log(trt: Any, lines: deque[tuple[bool, str]]) -> Any:
    severity = trt.ILogger.Severity
    errors = (severity.INTERNAL_ERROR, severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors for our own messages."""

        def log(self, severity: Any, text: str) -> None:
            if severity in (*errors, trt.ILogger.Severity.WARNING):
                lines.append((severity in errors, " ".join(text.split())))
            logger.debug("%s", text)  # our exceptions repeat what matters

    return Log()


class Engine:
    """A stage's plan, loaded and ready to create contexts; use it inside `with device:`.

    Args:
        flavor: the flavor that built the plan.
        runtime: the flavor's `Runtime`, which must outlive the engine.
        folder: the folder that holds the plan.
        stage: `stage1` or `stage2`.

    Attributes:
        stage: the stage.
        inputs: the input tensors.
        outputs: the output tensors.
        formats: the memory format of each of these tensors, by name.

    Raises:
        EngineError: if the plan is missing or was altered, or TensorRT cannot open it.
        UnsupportedGpuError: if this TensorRT does not support the GPU or its driver.
    """

    def __init__(self, flavor: Flavor, runtime: Any, folder: EngineFolder, stage: str) -> None:
        self.stage = stage
        self._flavor, self._folder = flavor, folder
        path = folder.plan(stage)
        plan = path.read_bytes()
        if reason := why_unsupported(flavor, runtime, plan):
            raise UnsupportedGpuError(f"{path}: {reason}")
        flavor.clear()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"{path}: {flavor.name} {flavor.version} cannot open it: {flavor.errors()}"
            )
        self._engine: Any = engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name).name == "INPUT" for name in names}
        self.inputs = tuple(self._spec(name) for name in names if is_input[name])
        self.outputs = tuple(self._spec(name) for name in names if not is_input[name])
        self.formats = {name: MemoryFormat(engine.get_tensor_format(name).name) for name in names}
        for name in LEVEL_STRIDES.keys() & self.formats.keys():
            if self.formats[name].name != folder.info.map_format:
                raise EngineError(
                    f"{path}: has {name} in TensorRT's format {self.formats[name].name}, expected "
                    f"{folder.info.map_format}; build it again with comask build --rebuild"
                )
        self._limits: dict[str, tuple[Shape, Shape]] = {}
        for spec in self.inputs:
            least, _, largest = engine.get_tensor_profile_shape(spec.name, PROFILE)
            self._limits[spec.name] = (tuple(least), tuple(largest))
        self._jit = JitCache(flavor, engine, folder.folder / JIT_CACHE.format(stage=stage))

    def _spec(self, name: str) -> TensorSpec:
        dtype = np.dtype(self._flavor.trt.nptype(self._engine.get_tensor_dtype(name)))
        shape = self._engine.get_tensor_shape(name)
        return TensorSpec(name, dtype, tuple("dynamic" if n < 0 else int(n) for n in shape))

    @property
    def largest_batch(self) -> int:
        """The largest number of images that may run together."""
        return self._limits["image_sizes"][1][0]

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Compares the shapes of all inputs with the profile.

        Raises:
            EngineError: if one is outside; the text names the tensor and the command for a wider engine.
        """
        for name, (least, largest) in self._limits.items():
            shape = shapes[name]
            if len(shape) != len(least) or not all(
                low <= size <= high for low, size, high in zip(least, shape, largest, strict=True)
            ):
                raise EngineError(
                    f"{self.stage}: {name} is {_text(shape)}, the engine in {self._folder.folder} "
                    f"takes {_text(least)} to {_text(largest)}; for other sizes: "
                    f"{widening_command(self._folder, name, shape)}"
                )

    @property
    def largest_scratch(self) -> int:
        """The bytes of scratch memory that a context needs for the largest shapes.

        A context that cannot tell the size for its shapes says 0, so this size is used instead.
        """
        if not self._engine.device_memory_size_v2:
            return 0
        return int(self._engine.get_device_memory_size_for_profile_v2(PROFILE))

    def new_context(self, graphs: Graphs = "none") -> Any:
        """Creates an execution context, which is freed with its last reference.

        If `manages_memory`, the context has no scratch memory until the caller provides it.

        Args:
            graphs: who captures calls as CUDA graphs. If comask does, TensorRT-RTX compiles the kernels
                for new shapes before it runs them. Otherwise, it compiles them in the background, and a
                graph of ours would replay forever the slower kernels that it uses meanwhile.

        Raises:
            EngineError: if TensorRT cannot create one.
        """
        trt = self._flavor.trt
        self._flavor.clear()
        config = self._jit.config(graphs)
        if config is not None:
            context = self._engine.create_execution_context(config)
        elif manages_memory(trt):
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(
                f"{self.stage}: {self._flavor.name} cannot make an execution context: "
                f"{self._flavor.errors()}"
            )
        return context

    def save_compiled(self) -> None:
        """Saves what TensorRT-RTX has compiled so far, so that a process that is killed loses nothing."""
        self._jit.save()

    def close(self) -> None:
        """Saves the JIT cache and frees the engine, whose contexts must have been freed before."""
        self._jit.save()
        self._jit.free()
        self._engine = None


def why_unsupported(flavor: Flavor, runtime: Any, plan: bytes) -> str:
    """Returns why this machine's GPU or driver cannot run a plan of TensorRT-RTX; empty if it may.

    TensorRT has no such question: a plan of its own is for the GPU that built it. Damaged plans are left
    to `deserialize_cuda_engine`, whose messages say more.
    """
    trt = flavor.trt
    if not hasattr(trt, "EngineValidity"):
        return ""
    validity, found = runtime.get_engine_validity(plan)
    reasons = [
        name
        for name in MACHINE_REASONS
        if int(found) & int(getattr(trt.EngineInvalidityDiagnostics, name))
    ]
    if validity != trt.EngineValidity.INVALID or not reasons:
        return ""
    return f"{flavor.name} {flavor.version} cannot run it on this machine: {', '.join(reasons)}"


class JitCache:
    """Keeps what TensorRT-RTX compiled for this GPU in a file for the next process."""

    def __init__(self, flavor: Flavor, engine: Any, path: Path) -> None:
        self._trt, self._path = flavor.trt, path
        self._saving = threading.Lock()
        self._configs: dict[Graphs, Any] = {}
        self._cache: Any = None
        self._loaded = b""
        if not hasattr(self._trt, "IRuntimeCache"):
            return
        for graphs in get_args(Graphs):
            self._configs[graphs] = self._new_config(engine, graphs)
        self._cache = self._configs["none"].create_runtime_cache()
        if path.exists():
            self._loaded = path.read_bytes()
            if not self._cache.deserialize(self._loaded):
                logger.info("%s: belongs to another GPU, driver or version; compiling again", path)
        for config in self._configs.values():
            config.set_runtime_cache(self._cache)

    def _new_config(self, engine: Any, graphs: Graphs) -> Any:
        config = engine.create_runtime_config()
        if manages_memory(self._trt):
            config.set_execution_context_allocation_strategy(
                self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            )
        if graphs == "captured":
            eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        if graphs == "internal":
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config

    def config(self, graphs: Graphs) -> Any:
        """Returns the configuration of new contexts; None for a flavor that compiles in the builder."""
        return self._configs.get(graphs)

    def save(self) -> None:
        """Writes the file if its content changed; logs it if the bundle is not writable."""
        if self._cache is None:
            return
        with self._saving:
            data = bytes(memoryview(self._cache.serialize()))
            if data != self._loaded:
                self._write(data)
                self._loaded = data

    def _write(self, data: bytes) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(self._path)
        except OSError as error:
            logger.info("%s: not saved, the next start compiles again: %s", self._path, error)
            temporary.unlink(missing_ok=True)

    def free(self) -> None:
        """Frees TensorRT's objects, whose contexts must have been freed before."""
        self._configs.clear()
        self._cache = None


def manages_memory(trt: Any) -> bool:
    """Returns whether contexts take scratch memory of the size that their shapes need (since 10.1)."""
    names = ("update_device_memory_size_for_shapes", "set_device_memory")
    return all(hasattr(trt.IExecutionContext, name) for name in names)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
