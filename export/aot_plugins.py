"""Registers comask's ops as TensorRT's ahead-of-time plugins, whose PTX and launches the plan contains.

A program that loads such a plan (trtexec, a C++ program, Triton) needs nothing of comask, so only the
builder needs this module. TensorRT supports such plugins by `tensorrt.plugin` since 10.9; TensorRT-RTX
does not.

A plugin describes a launch by expressions of the inputs' dimensions, whereas `comask.kernels.launch`
computes with numbers. `symbolic_launch` works with either, and tests compare the two.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from comask.errors import ComaskError, EngineError
from comask.kernels import compile
from comask.kernels.launch import (
    CHANNEL_BYTES,
    KEEP_THREADS,
    THREADS,
    TILE,
    Launch,
    float32_below,
    float_bits,
)
from comask.runtime.gpu import Gpu
from comask.runtime.trt.engine_folder import AMPERE
from comask.runtime.trt.flavor import Flavor
from comask.runtime.trt.memory_format import CHANNELS_LAST
from comask.runtime.trt.ops import (
    NAMESPACE,
    OPS,
    VERSION,
    DimensionMath,
    NmsKeepOp,
    NmsOverlapsOp,
    Op,
    TensorDesc,
)

TYPE_NAMES = {"FLOAT": "FP32", "HALF": "FP16"}  # DataType's names → autotuning's, if they differ


class Arithmetic(Protocol):
    """The operation on dimensions that has no operator; `tensorrt.plugin` implements it."""

    def cdiv(self, first: Any, second: Any, /) -> Any:
        """Returns the quotient, rounded up."""


def check_aot(flavor: Flavor) -> None:
    """Checks that a TensorRT supports ahead-of-time plugins.

    Raises:
        EngineError: it does not; the message names an alternative.
    """
    if flavor.name == "tensorrt-rtx":
        raise EngineError(
            "--plugin aot: tensorrt-rtx has no ahead-of-time plugins; use --plugin python or none"
        )
    if not hasattr(flavor.trt, "QuickPluginCreationRequest"):
        raise EngineError(
            f"--plugin aot: needs tensorrt 10.9 or newer, {flavor.version} is installed; "
            "upgrade it, or use --plugin python"
        )


def ptx_capability(gpu: Gpu, hardware_compatibility: str | None) -> int:
    """Returns the oldest compute capability that a plan supports; newer GPUs compile its PTX, too."""
    return AMPERE if hardware_compatibility == "ampere_plus" else gpu.capability


@functools.cache
def register_aot_plugins(flavor: Flavor, capability: int) -> None:
    """Registers the ops with a TensorRT's builder, once per process. Call it before parsing.

    Args:
        flavor: a TensorRT that passes `check_aot`.
        capability: the compute capability that the kernels are compiled for, 90 for 9.0.

    Raises:
        EngineError: this process has other plugins of these names.
        KernelError: the kernels cannot be compiled.
    """
    registry = flavor.trt.get_plugin_registry()
    for op in OPS:
        if registry.get_creator(op.name, VERSION, NAMESPACE) is not None:
            raise EngineError(
                f"--plugin aot: this process has another {NAMESPACE}::{op.name} already; "
                "build in a process of its own"
            )
    kernels = {
        name: compile.ptx(name, capability) for name in dict.fromkeys(op.kernel for op in OPS)
    }
    trtp = importlib.import_module(f"{flavor.trt.__name__}.plugin")
    for op in OPS:
        _declare(flavor, trtp, op, kernels[op.kernel])


def symbolic_launch(op: Op, inputs: Sequence[TensorDesc], arithmetic: Arithmetic) -> Launch:
    """Returns `op.launch(inputs)` for dimensions of any kind, without its checks and its `entry`.

    Args:
        op: the op.
        inputs: the inputs, whose shapes hold numbers or expressions.
        arithmetic: the operation on these dimensions.
    """
    if isinstance(op, NmsOverlapsOp):
        rows, boxes = inputs[1].shape
        tiles = arithmetic.cdiv(boxes, TILE)
        pairs = rows * arithmetic.cdiv(tiles * (tiles + 1), 2)
        integers = (rows, boxes, float_bits(float32_below(op.iou_threshold)))
        return Launch(op.kernel, "", pairs, TILE, integers)
    if isinstance(op, NmsKeepOp):
        rows, _, boxes = inputs[0].shape
        return Launch(op.kernel, "", rows, KEEP_THREADS, (rows, boxes))
    maps, (batch, count, _) = inputs[:4], inputs[4].shape
    channels = stride = maps[0].shape[1]
    if maps[0].format == "HWC8":
        multiple = CHANNELS_LAST["HWC8"]
        stride = arithmetic.cdiv(channels, multiple) * multiple
    tile = CHANNEL_BYTES // (2 if maps[0].type == "HALF" else 4)
    return Launch(
        source=op.kernel,
        entry="",
        grid=batch * count * arithmetic.cdiv(stride, tile),
        block=THREADS,
        integers=(
            maps[0].shape[0], channels, stride, *(side for desc in maps for side in desc.shape[2:]),
            batch * count, count, op.output_size, op.sampling_ratio, float_bits(op.canonical_size),
        ),
    )  # fmt: skip


def _declare(flavor: Flavor, trtp: Any, op: type[Op], ptx: bytes) -> None:
    """Registers one op: its output, the formats that it supports, and its launch."""
    trt, count = flavor.trt, op.num_inputs

    def describe(*inputs: Any, **attributes: Any) -> Any:
        made = op.from_attributes(_numbers(attributes))
        math = DimensionMath(int, operator.mul, trtp.cdiv)
        dims = made.output_shape([desc.shape_expr for desc in inputs], math)
        kind = made.output_type([desc.dtype.name for desc in inputs])
        return trtp.from_shape_expr(tuple(dims), getattr(trt.DataType, kind))

    def offer_formats(*descs: Any) -> list[Any]:
        # The network is strongly typed, so the types are fixed.
        types = [desc.dtype.name for desc in descs[:count]]
        return [
            trtp.AutoTuneCombination(
                ", ".join(TYPE_NAMES.get(kind, kind) for kind, _ in known),
                ", ".join(layout for _, layout in known),
            )
            for known in op.formats
            if [kind for kind, _ in known[:count]] == types
        ]

    def launch(*arguments: Any) -> tuple[str, bytes, Any, Any]:
        inputs, values = arguments[:count], arguments[count:-2]  # The last two: outputs and tactic.
        made = op.from_attributes(_numbers(dict(zip(op.attributes, values, strict=True))))
        # A launch of the largest shapes reveals now, not at run time, what the kernel cannot do.
        entry = made.launch([_desc(desc, _largest(desc.shape)) for desc in inputs]).entry
        symbolic = symbolic_launch(
            made, [_desc(desc, tuple(desc.shape_expr)) for desc in inputs], trtp
        )
        parameters = trtp.KernelLaunchParams(grid_x=symbolic.grid, block_x=symbolic.block)
        integers = trtp.SymIntExprs.from_tuple(
            [trtp.SymInt32(value) for value in symbolic.integers]
        )
        return entry, ptx, parameters, integers

    tensors = [(f"input{i}", trtp.TensorDesc) for i in range(count)]
    attributes = [(name, _annotation(kind)) for name, kind in op.attributes.items()]
    outputs, tactic = ("outputs", Parameter.empty), ("tactic", Parameter.empty)
    launched = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    name, signed = f"{NAMESPACE}::{op.name}", functools.partial(_signed, flavor)
    trtp.register(name)(signed(describe, [*tensors, *attributes], trtp.TensorDesc))
    trtp.autotune(name)(signed(offer_formats, [*tensors, outputs], Parameter.empty))
    trtp.aot_impl(name)(signed(launch, [*tensors, *attributes, outputs, tactic], launched))


def _signed(
    flavor: Flavor,
    function: Callable[..., Any],
    parameters: Sequence[tuple[str, Any]],
    returned: Any,
) -> Callable[..., Any]:
    """Returns a function with the signature from which TensorRT reads inputs and attributes."""

    def called(*arguments: Any, **attributes: Any) -> Any:
        try:
            return function(*arguments, **attributes)
        except ComaskError as error:
            flavor.plugin_errors.append(str(error))
            raise

    kind = Parameter.POSITIONAL_OR_KEYWORD
    called.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=returned,
    )
    return called


def _annotation(kind: type) -> Any:
    """Returns an array type even for a single number: TensorRT 10's `int` fails under NumPy 2.4."""
    return NDArray[np.float32] if kind is float else NDArray[np.int32]


def _numbers(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array.tolist()[0] for name, array in arrays.items()}


def _desc(desc: Any, shape: tuple[Any, ...]) -> TensorDesc:
    return TensorDesc(shape, desc.dtype.name, desc.format.name)


def _largest(shape: Any) -> tuple[int, ...]:
    return tuple(shape.max) if shape.is_dynamic else tuple(shape)
