"""One stage's plan, deserialised: its tensors by name, the sizes it takes, and contexts to run it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from comask.errors import EngineError
from comask.runtime.session import TensorSpec
from comask.runtime.trt.engine_folder import EngineFolder
from comask.runtime.trt.flavors import Flavor
from comask.runtime.trt.rebuild import widening_command

PROFILE = 0  # engines are built with one
JIT_CACHE = "{stage}.jit.cache"  # in the engine's folder

Shape = tuple[int, ...]

logger = logging.getLogger(__name__)


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
