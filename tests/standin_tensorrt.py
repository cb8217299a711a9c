"""A stand-in for the module `tensorrt`: plans are ONNX graphs, run by ONNX Runtime in "device" memory.

It has what our runtime calls, and refuses what TensorRT would refuse or crash at: inputs without shape,
shapes outside the profile, addresses that are null, unaligned, too small or not the device's, contexts
without scratch memory, engines whose plugins are not registered, objects that die in the wrong order,
threads without a CUDA context. Work is queued on the stand-in driver's streams (standin_cuda.c) and done
when they are synchronised; on a real driver's, a worker does it (standin_worker.py). `write_plan` makes a
plan; `install` puts this module in a real one's place.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import standin_worker

__version__ = "10.99.0"

ALIGNMENT = 256  # of device memory
MAGIC = "stand-in plan"
SCRATCH_A_PIXEL = 8  # bytes; so that the scratch memory's size depends on the shapes

driver = ctypes.CDLL("libcuda.so.1")
Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

alive: dict[str, int] = {"runtime": 0, "engine": 0, "context": 0}
failures: list[str] = []  # what went wrong where no exception can get out
tells_scratch = True  # whether contexts say how much scratch memory their shapes need
calls: list[str] = []  # of functions that cost time on a real TensorRT


def install(flavor: str = "tensorrt") -> None:
    """Makes `import tensorrt` (or `tensorrt_rtx`, which has more) give this module."""
    module = sys.modules[__name__]
    if flavor == "tensorrt_rtx":
        import standin_rtx

        standin_rtx.add_to(module)
    sys.modules[flavor] = module


def write_plan(
    path: Path,
    graph: Path,
    profiles: list[dict[str, Any]],
    plugins: tuple[str, ...],
    *,
    code: bool = False,
    formats: dict[str, str] | None = None,
) -> None:
    """A plan of this stand-in.

    Args:
        path: to write.
        graph: ONNX file.
        profiles: least, best and largest shape of each input, in each profile.
        plugins: names of those that it needs registered.
        code: whether it holds a lean runtime, which a runtime must be allowed to load.
        formats: TensorFormat's names for the tensors that are not linear.
    """
    values = {
        "profiles": profiles, "plugins": plugins, "code": code, "graph": str(graph),
        "formats": formats or {},
    }  # fmt: skip
    path.write_text(f"{MAGIC}\n{json.dumps(values)}")


def has_context() -> bool:
    context = ctypes.c_void_p()
    driver.cuCtxGetCurrent(ctypes.byref(context))
    return context.value is not None


class Lifetime:
    """Counts what lives; nothing may die without a context, or before what was made of it."""

    kind = ""
    children = ""

    def __init__(self) -> None:
        assert has_context(), f"a {self.kind} is made without a CUDA context"
        alive[self.kind] += 1

    def __del__(self) -> None:
        alive[self.kind] -= 1
        if not has_context():
            failures.append(f"a {self.kind} died without a CUDA context")
        if self.children and alive[self.children] and not alive[self.kind]:
            failures.append(f"the last {self.kind} died before its {self.children}")


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class TensorFormat(Enum):
    LINEAR, HWC, HWC8, CHW4 = range(4)


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


def nptype(kind: str) -> Any:
    return {
        "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8,
        "tensor(int32)": np.int32,
    }[kind]  # fmt: skip


# What plugins are made of; they are registered here and never run.
class IPluginV3: ...


class IPluginV3OneCore: ...


class IPluginV3OneBuild: ...


class IPluginV3OneRuntime: ...


class IPluginCreatorV3One: ...


class PluginField(NamedTuple):
    name: str
    data: Any
    type: str


PluginFieldCollection = list
PluginFieldType = SimpleNamespace(FLOAT32="f32", INT32="i32")


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get((name, version, namespace))

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True


registry = Registry()


def get_plugin_registry() -> Registry:
    return registry


class Runtime(Lifetime):
    kind, children = "runtime", "engine"

    def __init__(self, log: Any) -> None:
        super().__init__()
        self.log = log
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        magic, _, values = plan.decode(errors="replace").partition("\n")
        if magic != MAGIC:
            self.log.log(Severity.ERROR, "Serialization assertion failed: magic tag does not match")
            return None
        parts = json.loads(values)
        for name in parts["plugins"]:
            if registry.get_creator(name, "1", "comask") is None:
                self.log.log(Severity.ERROR, f"Cannot find plugin: {name}, version: 1")
                return None
        if parts["code"] and not self.engine_host_code_allowed:
            self.log.log(Severity.ERROR, "host code is not allowed")
            return None
        return Engine(self.log, Path(parts["graph"]), parts["profiles"], parts["formats"])


class Engine(Lifetime):
    kind, children = "engine", "context"

    def __init__(
        self, log: Any, graph: Path, profiles: list[dict[str, Any]], formats: dict[str, str]
    ) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.log, self.profiles, self.profile_taken = log, profiles, False
        self.num_optimization_profiles = len(profiles)
        self.formats = {name: TensorFormat[kind] for name, kind in formats.items()}
        self.graph = str(graph)
        self.session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.tensors = self.inputs | self.outputs
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        # in no order that anybody should rely on
        return sorted(self.tensors, key=lambda name: name[::-1])[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.tensors[name].type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(n if isinstance(n, int) else -1 for n in self.tensors[name].shape)

    def get_tensor_format(self, name: str) -> TensorFormat:
        return self.formats.get(name, TensorFormat.LINEAR)

    def stored(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in memory: of channels-last formats [B, H, W, C], C padded to whole vectors."""
        if self.get_tensor_format(name) is TensorFormat.LINEAR:
            return shape
        batch, channels, height, width = shape
        vector = 8 if self.get_tensor_format(name) is TensorFormat.HWC8 else 1
        return batch, height, width, -(-channels // vector) * vector

    def dtype(self, name: str) -> Any:
        return np.dtype(nptype(self.get_tensor_dtype(name)))

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.profiles[index][name]]

    def run(self, shapes: Any, addresses: Any, scratch: tuple[int, int] | None) -> None:
        if scratch is not None:
            ctypes.memset(scratch[0], 0x5A, scratch[1])  # whoever else lies there is lost
        arrays = {}
        for name, shape in shapes.items():
            stored = self.stored(name, shape)
            size = math.prod(stored) * self.dtype(name).itemsize
            memory = (ctypes.c_char * size).from_address(addresses[name])
            array = np.frombuffer(memory, self.dtype(name)).reshape(stored)
            if stored is not shape:
                assert not array[..., shape[1] :].any() or name in self.outputs, "dirty padding"
                array[..., shape[1] :] = 0
                array = np.moveaxis(array[..., : shape[1]], -1, 1)
            arrays[name] = array
        names = list(self.outputs)
        feeds = {name: arrays[name] for name in self.inputs}
        for name, result in zip(names, self.session.run(names, feeds), strict=True):
            arrays[name][...] = result

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2, range(len(self.profiles))))

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        shapes = self.profiles[index].values()
        return SCRATCH_A_PIXEL * max(math.prod(largest) for _, _, largest in shapes)

    def create_execution_context(
        self, strategy: Any = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext:
        return IExecutionContext(self, strategy)


class IExecutionContext(Lifetime):
    kind = "context"

    def __init__(self, engine: Engine, strategy: Any) -> None:
        super().__init__()
        self.engine = engine
        self.user_managed = strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.known_outputs: dict[Any, dict[str, tuple[int, ...]]] = {}
        self.queued: list[Any] = []  # callbacks must outlive their call
        self.captured: list[Any] = []
        self.jobs: dict[Any, standin_worker.Job] = {}
        # the first context of an engine gets its profile unasked
        self.active_optimization_profile = -1 if engine.profile_taken else 0
        engine.profile_taken = True

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream, "a profile is set on a stream"
        self.shapes, self.scratch = {}, None
        self.active_optimization_profile = index
        return True

    def fail(self, text: str) -> bool:
        self.engine.log.log(Severity.ERROR, text)
        return False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        calls.append("set_input_shape")
        profile = self.active_optimization_profile
        assert profile >= 0, "a shape before a profile"
        least, _, largest = self.engine.profiles[profile][name]
        inside = len(shape) == len(least) and all(
            a <= n <= b for a, n, b in zip(least, shape, largest, strict=True)
        )
        if not inside:
            return self.fail(
                f"Set dimension {shape} for tensor {name} does not satisfy any profile"
            )
        self.shapes[name] = tuple(shape)
        self.scratch = None  # parted anew for every shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        """TensorRT derives them from the graph; here it runs once on zeros."""
        assert not self.infer_shapes(), "output shapes without input shapes"
        key = tuple(sorted(self.shapes.items()))
        if key not in self.known_outputs:
            zeros = {n: np.zeros(s, self.engine.dtype(n)) for n, s in self.shapes.items()}
            names = list(self.engine.outputs)
            arrays = self.engine.session.run(names, zeros)
            self.known_outputs[key] = {n: a.shape for n, a in zip(names, arrays, strict=True)}
        return self.known_outputs[key]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name] if name in self.engine.inputs else self._output_shapes()[name]

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes(), "the scratch memory's size without input shapes"
        if standin_worker.wanted(driver):
            self._job()  # made here, since a capture allows no page-locking
        return self._needed() if tells_scratch else 0

    def _needed(self) -> int:
        return SCRATCH_A_PIXEL * max(math.prod(shape) for shape in self.shapes.values())

    def _job(self) -> standin_worker.Job:
        key, engine = tuple(sorted(self.shapes.items())), self.engine
        if key not in self.jobs:
            tensors = [
                {
                    n: (engine.dtype(n), shape, engine.stored(n, shape))
                    for n, shape in shapes.items()
                }
                for shapes in (self.shapes, self._output_shapes())
            ]
            self.jobs[key] = standin_worker.Job(driver, engine.graph, *tensors, self._needed())
        return self.jobs[key]

    def set_device_memory(self, address: int, size: int) -> None:
        assert self.user_managed, "scratch memory for a context that has its own"
        self.scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        calls.append("set_tensor_address")
        if name not in self.engine.tensors:
            return self.fail(f"no tensor {name}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if not has_context():
            return self.fail("no CUDA context")
        if self.infer_shapes():
            return self.fail(f"inputs without shape: {self.infer_shapes()}")
        shapes = self.shapes | self._output_shapes()
        sizes = {
            n: math.prod(self.engine.stored(n, s)) * self.engine.dtype(n).itemsize
            for n, s in shapes.items()
        }
        for name, size in sizes.items():
            address = self.addresses.get(name, 0)
            if not _is_device(address, size):
                return self.fail(
                    f"address {address:#x} of {name} is not {size} aligned device bytes"
                )
        if self.user_managed:
            needed = self._needed()
            if self.scratch is None or self.scratch[1] < needed or not _is_device(*self.scratch):
                return self.fail(f"scratch memory {self.scratch}, {needed} bytes are needed")
        engine, scratch, addresses = self.engine, self.scratch, dict(self.addresses)
        if standin_worker.wanted(driver):
            self._job().queue(stream, addresses, scratch and scratch[0])
            return True

        def work(_: Any) -> None:  # without self, which must die with its last user
            try:
                engine.run(shapes, addresses, scratch)
            except Exception as error:  # nothing gets out of a callback
                failures.append(repr(error))

        callback = Callback(work)
        if driver.standin_is_capturing(ctypes.c_void_p(stream)):
            self.captured.append(callback)  # called as often as the graph is launched
        self.queued = [*self.queued[-8:], callback]
        status = driver.standin_enqueue(ctypes.c_void_p(stream), self.queued[-1], None)
        return status == 0 or self.fail(f"stream {stream:#x}: {status}")


def _is_device(address: int, size: int) -> bool:
    if not address or address % ALIGNMENT:
        return False
    if not standin_worker.wanted(driver):
        return bool(driver.standin_is_device(ctypes.c_void_p(address), ctypes.c_size_t(size)))
    start, length = ctypes.c_void_p(), ctypes.c_size_t()  # of the allocation that it lies in
    status = driver.cuMemGetAddressRange_v2(
        ctypes.byref(start), ctypes.byref(length), ctypes.c_void_p(address)
    )
    return status == 0 and address + size <= (start.value or 0) + length.value
