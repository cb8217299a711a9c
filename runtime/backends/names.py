"""The names of backends, precisions and devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from comask.errors import BackendUnavailableError, BundleError, ComaskError

_SAME = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend.

    Attributes:
        module: its module, whose `open_backend(bundle, name, precision, options)` returns `Stages`;
            `precision` None stands for the fastest precision that it has engines of, else for fp32.
        extra: the extra of comask that installs it.
        graphs: for each precision in which it computes, that of the bundle's graphs that it reads.
    """

    module: str
    extra: str
    graphs: Mapping[str, str] = field(default_factory=lambda: _SAME)


# To add a backend, copy `ort.py` and add a line here.
BACKENDS = {
    "tensorrt": Backend("comask.runtime.backends.trt", "gpu"),
    "tensorrt-rtx": Backend("comask.runtime.backends.trt", "gpu"),
    "onnxruntime": Backend("comask.runtime.backends.ort", "ort"),
    "openvino": Backend(
        "comask.runtime.backends.openvino",
        "openvino",
        {"fp32": "fp32", "bf16": "fp32", "fp16": "fp32", "int8": "int8"},
    ),
    "torch": Backend("comask.runtime.backends.pytorch", "train", {"fp32": "fp32", "bf16": "fp32"}),
}

Device = int | Literal["cpu", "gpu", "npu"] | None
NvidiaDevice = int | Literal["cpu"] | None


def gpu_index(device: Device) -> int | None:
    """Returns the index of NVIDIA's GPU that a backend may use; None if it may use none."""
    if device in ("cpu", "npu"):
        return None
    return device if isinstance(device, int) else 0


def nvidia_device(name: str, device: Device) -> NvidiaDevice:
    """Returns the device for a backend that knows NVIDIA's GPUs alone.

    Raises:
        BackendUnavailableError: if an NPU was asked for.
    """
    if device == "npu":
        raise BackendUnavailableError(f"{name} does not run on an NPU; the openvino backend does")
    return 0 if device == "gpu" else device


def parse_backend(text: str) -> tuple[str, str]:
    """Splits `onnxruntime:int8` into name and precision, which is fp32 unless it is named.

    Raises:
        ComaskError: if the backend is unknown.
    """
    name, _, precision = text.partition(":")
    if name not in BACKENDS:
        raise ComaskError(
            f"unknown backend {name}: expected one of {', '.join(BACKENDS)}, and after a colon a "
            f"precision unless it is fp32 (onnxruntime:fp16)"
        )
    return name, precision or "fp32"


def graph_precision(name: str, precision: str) -> str:
    """Returns the precision of the bundle's graphs that a backend reads to compute in a precision.

    Raises:
        BundleError: if the backend does not compute in it.
    """
    graphs = BACKENDS[name].graphs
    if precision not in graphs:
        raise BundleError(
            f"the {name} backend computes in {', '.join(graphs)}; {precision} was asked for"
        )
    return graphs[precision]
