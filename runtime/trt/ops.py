"""Describes our custom ops to TensorRT, independently of its version.

Each class is one node of the graph that TensorRT parses: its attributes, the resulting shapes and types,
the memory formats that its kernel takes, and the launch. `plugins.py` and `aot_plugins.py` wrap them in
TensorRT's interfaces.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from typing_extensions import override

from comask.errors import EngineError
from comask.kernels.compile import FOLDER, HEADER
from comask.kernels.launch import (
    LEVEL_STRIDES,
    TILE,
    Launch,
    nms_keep_launch,
    nms_overlaps_launch,
    roi_align_launch,
)
from comask.runtime.trt.memory_format import LINEAR, MemoryFormat

NAMESPACE = "comask"
VERSION = "1"
LINEAR_F32 = ("FLOAT", "LINEAR")
LINEAR_I32 = ("INT32", "LINEAR")
# each combination that a kernel takes: (type, format) of the inputs, then of the output
Formats = tuple[tuple[tuple[str, str], ...], ...]


@dataclass(frozen=True, slots=True)
class TensorDesc:
    """An input or output as TensorRT passes it to a plugin.

    Attributes:
        shape: the shape with the logical number of channels, even if the format pads them.
        type: name of TensorRT's DataType: FLOAT, HALF, INT32, BOOL.
        format: name of TensorRT's TensorFormat: LINEAR, HWC, HWC8.
    """

    shape: tuple[int, ...]
    type: str
    format: str


@dataclass(frozen=True, slots=True)
class DimensionMath:
    """Arithmetic with symbolic dimensions, which each kind of plugin has in a form of its own.

    Attributes:
        constant: returns a number as a dimension.
        product: multiplies two dimensions.
        quotient: divides two dimensions and rounds up.
    """

    constant: Callable[[int], Any]
    product: Callable[[Any, Any], Any]
    quotient: Callable[[Any, Any], Any]


class CustomOp(ABC):
    """A node of one of our ops, whose fields are the node's attributes."""

    __slots__ = ()

    name: ClassVar[str]
    kernel: ClassVar[str]  # name of its source file
    num_inputs: ClassVar[int]
    attributes: ClassVar[Mapping[str, type]]  # attribute of the ONNX node → Python type
    # Attributes whose values the kernel fixes. They are checked in the graph, because TensorRT's Python
    # API before 10.16 repeats the first number of a list in place of the others.
    fixed: ClassVar[Mapping[str, Any]]
    formats: ClassVar[Formats]

    @classmethod
    def from_attributes(cls, values: Mapping[str, Any]) -> Self:
        """Creates the op from a node's attributes or an engine's fields.

        Raises:
            EngineError: if one is missing.
        """
        missing = [name for name in cls.attributes if name not in values]
        if missing:
            raise EngineError(
                f"{cls.name}: has no attribute {', '.join(missing)}; export the bundle again with this "
                "comask"
            )
        return cls(**{name: values[name] for name in cls.attributes})

    def fields(self) -> dict[str, Any]:
        """Returns the values that an engine must hold to create this op again."""
        return {name: getattr(self, name) for name in self.attributes}

    def supports(self, position: int, descs: Sequence[TensorDesc]) -> bool:
        """Returns whether the kernel takes tensor `position` in its format, given the ones before it."""
        asked = tuple((desc.type, desc.format) for desc in descs[: position + 1])
        return any(known[: position + 1] == asked for known in self.formats)

    @abstractmethod
    def output_type(self, input_types: Sequence[str]) -> str:
        """Returns the name of the output's type for the names of the inputs' types."""

    @abstractmethod
    def output_shape(self, inputs: Sequence[Any], math: DimensionMath) -> list[Any]:
        """Returns the output's symbolic dimensions for those of the inputs; quotients are rounded up."""

    @abstractmethod
    def launch(self, inputs: Sequence[TensorDesc]) -> Launch:
        """Returns the kernel launch for inputs of these shapes."""


@dataclass(frozen=True, slots=True)
class PyramidRoiAlignOp(CustomOp):
    """`PyramidRoiAlign(p2, p3, p4, p5, rois [B, N, 4]) → [B·N, C, S, S]`.

    Attributes:
        output_size: S.
        sampling_ratio: samples per bin and axis.
        canonical_size: side in pixels of a RoI that is pooled from P4.
    """

    output_size: int
    sampling_ratio: int
    canonical_size: float

    name: ClassVar[str] = "PyramidRoiAlign"
    kernel: ClassVar[str] = "pyramid_roi_align"
    num_inputs: ClassVar[int] = 5
    attributes: ClassVar[Mapping[str, type]] = {
        "output_size": int, "sampling_ratio": int, "canonical_size": float,
    }  # fmt: skip
    fixed: ClassVar[Mapping[str, Any]] = {
        "canonical_level": 4, "strides": tuple(LEVEL_STRIDES.values()), "aligned": 1,
    }  # fmt: skip
    formats: ClassVar[Formats] = tuple(
        (maps, maps, maps, maps, LINEAR_F32, maps)
        for maps in (LINEAR_F32, ("HALF", "LINEAR"), ("FLOAT", "HWC"), ("HALF", "HWC8"))
    )

    @override
    def output_type(self, input_types: Sequence[str]) -> str:
        return input_types[0]

    @override
    def output_shape(self, inputs: Sequence[Any], math: DimensionMath) -> list[Any]:
        rois, size = inputs[4], math.constant(self.output_size)
        return [math.product(rois[0], rois[1]), inputs[0][1], size, size]

    @override
    def launch(self, inputs: Sequence[TensorDesc]) -> Launch:
        maps, (batch, count, _) = inputs[:4], inputs[4].shape
        channels = maps[0].shape[1]
        stored = MemoryFormat(maps[0].format).stored(maps[0].shape)
        return roi_align_launch(
            tuple(desc.shape for desc in maps),
            batch * count,
            count,
            self.output_size,
            self.sampling_ratio,
            self.canonical_size,
            half=maps[0].type == "HALF",
            channels_last=maps[0].format != LINEAR,
            channel_stride=channels if maps[0].format == LINEAR else stored[-1],
        )


@dataclass(frozen=True, slots=True)
class NmsOverlapsOp(CustomOp):
    """`NmsOverlaps(boxes [G, M, 4], group_ids [G, M]) → words [G, ⌈M / 32⌉, M]`.

    With `NmsKeep`, it takes the place of `SortedNms`; `nms_overlaps_launch` explains the words.

    Attributes:
        iou_threshold: a box is dropped if its IoU with a kept one exceeds this f32.
    """

    iou_threshold: float

    name: ClassVar[str] = "NmsOverlaps"
    kernel: ClassVar[str] = "sorted_nms"
    num_inputs: ClassVar[int] = 2
    attributes: ClassVar[Mapping[str, type]] = {"iou_threshold": float}
    fixed: ClassVar[Mapping[str, Any]] = {}
    formats: ClassVar[Formats] = ((LINEAR_F32, LINEAR_I32, LINEAR_I32),)

    @override
    def output_type(self, input_types: Sequence[str]) -> str:
        return "INT32"

    @override
    def output_shape(self, inputs: Sequence[Any], math: DimensionMath) -> list[Any]:
        rows, boxes = inputs[1][0], inputs[1][1]
        return [rows, math.quotient(boxes, math.constant(TILE)), boxes]

    @override
    def launch(self, inputs: Sequence[TensorDesc]) -> Launch:
        rows, boxes = inputs[1].shape
        return nms_overlaps_launch(rows, boxes, self.iou_threshold)


@dataclass(frozen=True, slots=True)
class NmsKeepOp(CustomOp):
    """`NmsKeep(words [G, ⌈M / 32⌉, M]) → keep [G, M]`, for the words of `NmsOverlaps`."""

    name: ClassVar[str] = "NmsKeep"
    kernel: ClassVar[str] = "sorted_nms"
    num_inputs: ClassVar[int] = 1
    attributes: ClassVar[Mapping[str, type]] = {}
    fixed: ClassVar[Mapping[str, Any]] = {}
    formats: ClassVar[Formats] = ((LINEAR_I32, ("BOOL", "LINEAR")),)

    @override
    def output_type(self, input_types: Sequence[str]) -> str:
        return "BOOL"

    @override
    def output_shape(self, inputs: Sequence[Any], math: DimensionMath) -> list[Any]:
        return [inputs[0][0], inputs[0][2]]

    @override
    def launch(self, inputs: Sequence[TensorDesc]) -> Launch:
        rows, _, boxes = inputs[0].shape
        return nms_keep_launch(rows, boxes)


Op = PyramidRoiAlignOp | NmsOverlapsOp | NmsKeepOp
OPS: tuple[type[Op], ...] = (PyramidRoiAlignOp, NmsOverlapsOp, NmsKeepOp)


def check_fixed(op_type: str, values: Mapping[str, Any]) -> None:
    """Compares a node's attributes with the values that its kernel fixes.

    Raises:
        EngineError: if one differs; the text names it.
    """
    for op in OPS:
        for name, value in op.fixed.items() if op.name == op_type else ():
            if values.get(name, value) != value:
                raise EngineError(
                    f"{op_type}: {name} is {values[name]}, the kernel supports only {value}; export the "
                    f"bundle again with this comask"
                )


def kernels_sha256() -> str:
    """Returns one hash of the sources of our plugins' kernels, which plans hold or call."""
    digest = hashlib.sha256(f"{NAMESPACE} {VERSION}".encode())
    for name in sorted({HEADER, *(f"{op.kernel}.cu" for op in OPS)}):
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()
