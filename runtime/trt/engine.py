"""TensorRT engines: the two flavors of the library, and a plan of either, loaded."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comask.errors import BackendUnavailableError, EngineError
from comask.runtime.backends.base import TensorSpec
from comask.runtime.trt.engine_folder import EngineFolder, widening_command

LIBRARY = "libtensorrt_rtx.so"

__all__ = ["load_flavor"]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # flavor → module
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
OLDEST = 10  # IPluginV3 and strong typing
KEPT_LINES = 50  # of the log, for error messages
NO_DRIVER = "CUDA driver version is insufficient"

logger = logging.getLogger(__name__)

PROFILE = 0  # engines are built with one
JIT_CACHE = "{stage}.jit.cache"  # in the engine's folder

Shape = tuple[int, ...]


def wheel_library() -> Path | None:
    """The wheel's library where its unversioned name is missing; None where nothing is."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return None  # installed some other way, with the system's linker in charge
    folder = Path(spec.origin).parent
    if (folder / LIBRARY).exists():  # the parser looks beside itself
        return None
    versioned = sorted(folder.glob(f"{LIBRARY}.*"))
    if not versioned or _loads(LIBRARY):
        return None
    return versioned[-1]


def search_path(folder: Path) -> str | None:
    """The LD_LIBRARY_PATH under which a new process parses plugins; None where it does anyway.

    Args:
        folder: an existing one; gets the missing link.
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
        version: as it names itself.
        log: TensorRT's `ILogger`; it takes one a process, so everything must use this one.
        lines: the latest warnings and errors, oldest first, each with whether it is an error.
        plugin_errors: what our plugins raised inside TensorRT, which drops it.
    """

    name: str
    trt: Any
    version: str
    log: Any
    lines: deque[tuple[bool, str]]
    plugin_errors: list[str]

    def errors(self) -> str:
        """What went wrong since `clear`, in one line: our plugins' errors, TensorRT's, or its warnings.

        Where several threads run engines it may hold another one's errors too.
        """
        lines = self.lines.copy()  # other threads log meanwhile
        errors = list(self.plugin_errors) or [text for is_error, text in lines if is_error]
        told = list(dict.fromkeys(errors or [text for _, text in lines]))
        # every failing call without a GPU adds one of these
        told = [text for text in told if NO_DRIVER not in text] or told
        return "; ".join(told) or "it logged nothing"

    def clear(self) -> None:
        """Forgets what was logged."""
        self.lines.clear()
        self.plugin_errors.clear()


@functools.cache
def load_flavor(name: str) -> Flavor:
    """Imports a flavor.

    Args:
        name: `tensorrt` or `tensorrt-rtx`.

    Raises:
        BackendUnavailableError: when it cannot be imported, or is older than 10.
    """
    # find_spec proves nothing: the bindings are there without the library in some installations.
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
            logger.debug("%s", text)  # what matters of it comes back in our exceptions

    return Log()


class Engine:
    """A plan of one stage, ready to make contexts; all of it inside `with device:`.

    Args:
        flavor: that built it.
        runtime: the flavor's `Runtime`; must outlive the engine.
        folder: holds the plan.
        stage: `stage1` or `stage2`.

    Attributes:
        stage: see above.
        inputs: what it is fed.
        outputs: what it computes.

    Raises:
        EngineError: when the plan is missing, altered, or not one that TensorRT opens.
    """

    def __init__(self, flavor: Flavor, runtime: Any, folder: EngineFolder, stage: str) -> None:
        self.stage = stage
        self._flavor, self._folder = flavor, folder
        path = folder.plan(stage)
        flavor.clear()
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(
                f"{path}: {flavor.name} {flavor.version} cannot open it: {flavor.errors()}"
            )
        self._engine: Any = engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name).name == "INPUT" for name in names}
        self.inputs = tuple(self._spec(name) for name in names if is_input[name])
        self.outputs = tuple(self._spec(name) for name in names if not is_input[name])
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
        """Images that may run together."""
        return self._limits["image_sizes"][1][0]

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Compares the shapes of all inputs with the profile.

        Raises:
            EngineError: naming the first tensor that lies outside, and how to build a wider engine.
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

    def new_context(self) -> Any:
        """An execution context; whoever made it frees it by dropping its last reference.

        Where `manages_memory`, it has no scratch memory until it is given some.

        Raises:
            EngineError: when TensorRT cannot make one.
        """
        trt = self._flavor.trt
        self._flavor.clear()
        if self._jit.config is not None:
            context = self._engine.create_execution_context(self._jit.config)
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

    def close(self) -> None:
        """Frees it; its contexts must be gone."""
        self._jit.save()
        self._jit.config = self._jit.cache = self._engine = None


class JitCache:
    """What TensorRT-RTX compiled for this GPU, kept in a file for the next process.

    Attributes:
        config: for new contexts; None for a TensorRT that compiles nothing when it runs.
        cache: TensorRT's.
    """

    def __init__(self, flavor: Flavor, engine: Any, path: Path) -> None:
        self.config: Any = None
        self.cache: Any = None
        self._path = path
        self._loaded = b""
        trt = flavor.trt
        if not hasattr(trt, "IRuntimeCache"):
            return
        self.config = engine.create_runtime_config()
        if manages_memory(trt):
            self.config.set_execution_context_allocation_strategy(
                trt.ExecutionContextAllocationStrategy.USER_MANAGED
            )
        self.cache = self.config.create_runtime_cache()
        if path.exists():
            self._loaded = path.read_bytes()
            if not self.cache.deserialize(self._loaded):
                logger.info("%s: is of another GPU, driver or version; it is made again", path)
        self.config.set_runtime_cache(self.cache)

    def save(self) -> None:
        """Writes the file if there is anything new; a bundle that cannot be written to stays as it is."""
        if self.cache is None:
            return
        data = bytes(memoryview(self.cache.serialize()))
        if data == self._loaded:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(self._path)
        except OSError as error:
            logger.info("%s: not saved, the next start compiles again: %s", self._path, error)
            temporary.unlink(missing_ok=True)


def manages_memory(trt: Any) -> bool:
    """Whether contexts can be given scratch memory of the size that their shapes need (10.1 on)."""
    names = ("update_device_memory_size_for_shapes", "set_device_memory")
    return all(hasattr(trt.IExecutionContext, name) for name in names)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
