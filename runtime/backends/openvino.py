"""The OpenVINO backend: runs the bundle's graphs on x86 and ARM processors, Intel's GPUs and NPUs.

The fp32 graphs run in fp32, bf16 and fp16, the int8 graphs in int8. OpenVINO takes the arithmetic that it
is told for the layers that are not quantised; the graphs stay as they are in the bundle.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import openvino as ov

from comask.bundle import STAGES, Bundle
from comask.errors import BackendUnavailableError, BundleError, EngineError, is_out_of_memory
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.base import Stages, TensorSpec
from comask.runtime.backends.names import Device, graph_precision
from comask.runtime.trt.engine_folder import ENGINES

# For each precision, the fastest first: OpenVINO's name of the arithmetic of layers that are not
# quantised, and the capability of a device that has the precision.
ARITHMETIC = {
    "int8": ("f32", "INT8"), "bf16": ("bf16", "BF16"), "fp16": ("f16", "FP16"), "fp32": ("f32", "FP32"),
}  # fmt: skip
CACHE = ".openvino"  # in the folder of the engines; a folder for each version

logger = logging.getLogger(__name__)


@functools.cache
def core() -> ov.Core:
    """Returns the process's only core, which lives as long as the process.

    OpenVINO 2026.4 gives the thread that first uses the processor another stack for signal handlers, and
    frees it with the core. If another thread frees it, the next handled signal (Ctrl-C, or the end of a
    child process) ends the process without a word.
    """
    return ov.Core()


class OpenVinoStage:
    """An ONNX file in OpenVINO.

    Args:
        graph: path of the file.
        device: OpenVINO's name of the device, such as `CPU`.
        settings: OpenVINO's settings.

    Raises:
        BundleError: if OpenVINO cannot load the file.
        EngineError: if memory runs out.
    """

    def __init__(self, graph: Path, device: str, settings: Mapping[str, Any]) -> None:
        # OpenVINO does not know functions
        model = onnx.inliner.inline_local_functions(onnx.load(graph))
        try:
            read = core().read_model(model.SerializeToString())
            self._compiled: Any = core().compile_model(read, device, dict(settings))
        except RuntimeError as error:  # the base of all its exceptions
            if is_out_of_memory(error):
                raise EngineError(f"{graph}: not enough memory to load it: {error}") from error
            raise BundleError(f"{graph}: OpenVINO cannot load it: {error}") from error
        self.inputs = _specs(model.graph.input, self._compiled.input)
        self.outputs = _specs(model.graph.output, self._compiled.output)
        self._idle: SimpleQueue[Any] = SimpleQueue()  # requests, each of which one thread may use

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """Runs the graph; all outputs are arrays."""
        if self._compiled is None:
            raise RuntimeError("this stage is closed")
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self._compiled.create_infer_request()
        arrays = {
            spec.name: np.asarray(feeds[spec.name], dtype=spec.dtype, order="C")
            for spec in self.inputs
        }
        found = request.infer(arrays, share_inputs=True)
        outputs = {spec.name: found[spec.name] for spec in self.outputs}
        self._idle.put(request)
        return outputs

    def close(self) -> None:
        """Frees the graph; it cannot run afterwards."""
        self._compiled, self._idle = None, SimpleQueue()


def open_backend(bundle: Bundle, name: str, precision: str | None, options: LoadOptions) -> Stages:
    """Opens the bundle's graphs; see `comask.runtime.backends.names.BACKENDS`.

    Raises:
        BackendUnavailableError: if the device is missing or has no arithmetic of the precision, or fp16
            cannot hold the network's values.
        BundleError: if a graph is missing, altered or broken.
        EngineError: if memory runs out.
    """
    precision = precision or "fp32"
    islands = bundle.manifest.verification.get("fp16", {}).get("float_layers")
    if precision == "fp16" and islands:
        raise BackendUnavailableError(
            f"{bundle.folder}: values of {len(islands)} modules do not fit fp16, such as "
            f"{islands[0]['module']}'s, and openvino:fp16 would compute them in it: take openvino:bf16"
        )
    device = _device(options.device)
    settings = settings_for(device, precision) | _cache(bundle)
    stage1, stage2 = (
        OpenVinoStage(bundle.graph(stage, graph_precision(name, precision)), device, settings)
        for stage in STAGES
    )
    place = device.lower().replace(".", ":")
    return Stages(f"{name}:{precision}", stage1, stage2, device=place)


def precisions_on(device: Device) -> tuple[str, ...]:
    """Returns the precisions in which a device of OpenVINO computes, fastest first.

    Raises:
        BackendUnavailableError: if OpenVINO does not find the device.
    """
    offered = core().get_property(_device(device), "OPTIMIZATION_CAPABILITIES")
    return tuple(name for name, (_, capability) in ARITHMETIC.items() if capability in offered)


def _device(wanted: Device) -> str:
    """Returns OpenVINO's name of a device: the CPU unless another one is asked for."""
    name = (
        "CPU" if wanted is None else f"GPU.{wanted}" if isinstance(wanted, int) else wanted.upper()
    )
    there = core().available_devices
    # with a single GPU, OpenVINO leaves its number out
    if name not in there and not (name in ("GPU", "GPU.0") and {"GPU", "GPU.0"} & set(there)):
        raise BackendUnavailableError(
            f"the openvino backend: device {wanted} was asked for, and OpenVINO {ov.__version__} finds "
            f"{', '.join(there) or 'none'}; it runs on Intel's GPUs and NPUs if their drivers are there"
        )
    return name


def settings_for(device: str, precision: str) -> dict[str, Any]:
    """Returns OpenVINO's settings for a precision.

    Raises:
        BackendUnavailableError: if the device has no arithmetic of the precision.
    """
    offered = core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    wanted, capability = ARITHMETIC[precision]
    if capability not in offered:
        raise BackendUnavailableError(
            f"the openvino backend: {device} here has no {precision} arithmetic, only "
            f"{', '.join(offered)}: take openvino:fp32"
        )
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": wanted,
    }  # fmt: skip
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = int(threads)
    return settings


def _cache(bundle: Bundle) -> dict[str, Any]:
    """Returns the setting that keeps compiled graphs beside the engines; none if that is impossible."""
    cache = bundle.folder / ENGINES / f"{CACHE}-{ov.__version__.partition('-')[0]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.info("openvino: without a cache of compiled graphs: %s", error)
        return {}
    return {"CACHE_DIR": str(cache)}


def _specs(
    values: Iterable[onnx.ValueInfoProto], port_of: Callable[[str], Any]
) -> tuple[TensorSpec, ...]:
    """Returns names and shapes as the graph has them, since OpenVINO forgets names of dimensions."""
    return tuple(
        TensorSpec(
            value.name,
            np.dtype(port_of(value.name).element_type.to_dtype()),
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in values
    )
