"""What the stand-in TensorRT has in addition as TensorRT-RTX: it compiles its kernels when it runs.

A context that compiles lazily runs its first calls with new shapes by fallback kernels, as TensorRT-RTX
does until its background threads are done. `captured` says which kernels a capture recorded.
"""

from __future__ import annotations

import ctypes
from enum import Enum, IntFlag
from types import ModuleType
from typing import Any

import standin_tensorrt
from standin_tensorrt import Engine, ExecutionContextAllocationStrategy, IExecutionContext, Runtime

FALLBACK_CALLS = 3  # calls with the same shapes before lazily compiled kernels are ready

captured: list[str] = []  # "fallback" or "specialized" for each call that a graph captured
graphs_used: list[Any] = []  # the strategy of each call's context
validity: list[tuple[Any, int]] = []  # the answer of `get_engine_validity`, if not VALID
capturable: list[bool] = []  # the answer of `is_stream_capturable`, if not True


def add_to(module: ModuleType) -> None:
    """Gives the stand-in TensorRT what only TensorRT-RTX has."""
    added = (
        CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy, EngineInvalidityDiagnostics,
        EngineValidity,
    )  # fmt: skip
    for kind in added:
        setattr(module, kind.__name__, kind)
    module.IRuntimeCache = RuntimeCache  # type: ignore[attr-defined]
    Runtime.get_engine_validity = get_engine_validity  # type: ignore[attr-defined]
    Engine.create_runtime_config = lambda self: RuntimeConfig()  # type: ignore[attr-defined]
    Engine.create_execution_context = lambda self, config: RtxContext(self, config)  # type: ignore


class CudaGraphStrategy(Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class EngineValidity(Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(IntFlag):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER, OLD_CUDA_RUNTIME = 1, 2, 4, 8
    INSUFFICIENT_GPU_MEMORY, MALFORMED_ENGINE, CUDA_ERROR = 16, 32, 64


def get_engine_validity(self: Runtime, plan: bytes) -> tuple[EngineValidity, int]:
    return validity[0] if validity else (EngineValidity.VALID, 0)


class RuntimeCache:
    """Holds the input shapes that were ever compiled for."""

    def __init__(self) -> None:
        self.compiled: set[str] = set()

    def serialize(self) -> bytes:
        return "\n".join(sorted(self.compiled)).encode()

    def deserialize(self, data: bytes) -> bool:
        self.compiled = set(data.decode().splitlines())
        return True


class RuntimeConfig:
    """Stands in for TensorRT-RTX's `IRuntimeConfig`."""

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = (
            DynamicShapesKernelSpecializationStrategy.LAZY
        )
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache = RuntimeCache()

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RtxContext(IExecutionContext):
    """Compiles kernels for each shape, at once or while fallback kernels run."""

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        super().__init__(engine, config.strategy)
        self.config, self.calls_by_shape = config, {}  # type: ignore[var-annotated]

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream, "a capture is on a stream"
        return capturable[0] if capturable else True

    def execute_async_v3(self, stream: int) -> bool:
        shapes = str(sorted(self.shapes.items()))
        graphs_used.append(self.config.cuda_graph_strategy)
        calls = self.calls_by_shape[shapes] = self.calls_by_shape.get(shapes, 0) + 1
        lazy = (
            self.config.dynamic_shapes_kernel_specialization_strategy
            is DynamicShapesKernelSpecializationStrategy.LAZY
        )
        if standin_tensorrt.driver.standin_is_capturing(ctypes.c_void_p(stream)):
            captured.append("fallback" if lazy and calls <= FALLBACK_CALLS else "specialized")
        self.config.cache.compiled.add(shapes)
        return super().execute_async_v3(stream)
