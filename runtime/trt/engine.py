"""TensorRT engines: loads plans, and says which shapes they take."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from comask.errors import EngineError, UnsupportedGpuError
from comask.kernels.launch import LEVEL_STRIDES
from comask.runtime.backends.base import TensorSpec
from comask.runtime.trt.engine_folder import EngineFolder, widening_command
from comask.runtime.trt.flavor import Flavor
from comask.runtime.trt.graphs import Graphs
from comask.runtime.trt.memory_format import MemoryFormat

# reasons of `EngineInvalidityDiagnostics` that lie in the machine and not in the plan
MACHINE_REASONS = (
    "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY",
)  # fmt: skip
JIT_CACHE = "{stage}.jit.cache"  # file in the engine's folder

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


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
        self._profiles = [self._limits(i) for i in range(engine.num_optimization_profiles)]
        self._jit = JitCache(flavor, engine, folder.folder / JIT_CACHE.format(stage=stage))

    def _spec(self, name: str) -> TensorSpec:
        dtype = np.dtype(self._flavor.trt.nptype(self._engine.get_tensor_dtype(name)))
        shape = self._engine.get_tensor_shape(name)
        return TensorSpec(name, dtype, tuple("dynamic" if n < 0 else int(n) for n in shape))

    def _limits(self, profile: int) -> dict[str, tuple[Shape, Shape]]:
        """Returns the least and the largest shape of each input in a profile."""
        limits = {}
        for spec in self.inputs:
            least, _, largest = self._engine.get_tensor_profile_shape(spec.name, profile)
            limits[spec.name] = tuple(least), tuple(largest)
        return limits

    @property
    def largest_batch(self) -> int:
        """The largest number of images that may run together."""
        return max(map(self._largest_batch, range(len(self._profiles))))

    def profile_for(self, shapes: Mapping[str, Shape]) -> int:
        """Returns the index of the profile for the smallest batches that has the shapes of all inputs.

        If each shape is in some profile, but no profile has all of them, it is 0, whose shapes TensorRT
        checks itself.

        Raises:
            EngineError: if one is outside; the text names the tensor and the command for a wider engine.
        """
        for name, shape in shapes.items():
            limits = [profile[name] for profile in self._profiles]
            if not any(_within(shape, *limit) for limit in limits):
                least = np.min([least for least, _ in limits], axis=0)
                largest = np.max([largest for _, largest in limits], axis=0)
                raise EngineError(
                    f"{self.stage}: {name} is {_text(shape)}, the engine in {self._folder.folder} "
                    f"takes {_text(least)} to {_text(largest)}; for other sizes: "
                    f"{widening_command(self._folder, name, shape)}"
                )
        fitting = (
            index
            for index, profile in enumerate(self._profiles)
            if all(_within(shapes[name], *limit) for name, limit in profile.items())
        )
        return min(fitting, key=self._largest_batch, default=0)

    def _largest_batch(self, profile: int) -> int:
        _, (batch, *_) = self._profiles[profile]["image_sizes"]
        return batch

    def largest_scratch(self, profile: int) -> int:
        """Returns the bytes of scratch memory that a context needs for a profile's largest shapes.

        A context that cannot tell the size for its shapes says 0, so this size is used instead.
        """
        if not self._engine.device_memory_size_v2:
            return 0
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

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


def _within(shape: Shape, least: Shape, largest: Shape) -> bool:
    return len(shape) == len(least) and all(
        low <= size <= high for low, size, high in zip(least, shape, largest, strict=True)
    )


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
