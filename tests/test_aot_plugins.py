"""Ahead-of-time plugins: what TensorRT is told of our ops, on a stand-in of `tensorrt.plugin`.

The stand-in's dimensions can do no more than TensorRT's, so that whatever needs numbers fails here too.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FEW

from comask.errors import EngineError, KernelError
from comask.export import engine_process
from comask.export.aot_plugins import (
    check_aot,
    register_aot_plugins,
    symbolic_launch,
)
from comask.export.build_options import BuildOptions, check_options
from comask.kernels import compile
from comask.runtime.gpu import Gpu
from comask.runtime.trt.flavor import Flavor
from comask.runtime.trt.ops import (
    DimensionMath,
    NmsKeepOp,
    NmsOverlapsOp,
    Op,
    PyramidRoiAlignOp,
    TensorDesc,
)

H100 = Gpu("H100", 90, 13000, 2**36)
ROI_ALIGN = {"output_size": 7, "sampling_ratio": 2, "canonical_size": 224.0}
NUMBERS = SimpleNamespace(cdiv=lambda a, b: math.ceil(a / b))
counts = st.integers(1, 1200)


class Dim:
    """A dimension: no truth, order or hash, and numbers only on the right, as TensorRT's."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self.value: int = value.value if isinstance(value, Dim) else value

    def __mul__(self, other: Dim | int) -> Dim:
        return Dim(self.value * Dim(other).value)

    def __add__(self, other: Dim | int) -> Dim:
        return Dim(self.value + Dim(other).value)

    def __bool__(self) -> bool:
        raise RuntimeError("a dimension has no truth")

    def __eq__(self, other: object) -> Any:
        raise RuntimeError("a dimension has no number")


def on_dims(function: Callable[[int, int], int]) -> Callable[[Any, Any], Dim]:
    return lambda first, second: Dim(function(Dim(first).value, Dim(second).value))


class Declared(ModuleType):
    """`tensorrt.plugin`, keeping what is declared; ids → function."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.TensorDesc = SimpleNamespace
        self.SymInt32 = Dim
        self.KernelLaunchParams = SimpleNamespace
        self.SymIntExprs = SimpleNamespace(from_tuple=tuple)
        self.AutoTuneCombination = lambda types, layouts: (types.split(", "), layouts.split(", "))
        self.from_shape_expr = lambda dims, dtype: ([Dim(d).value for d in dims], dtype)
        self.cdiv = on_dims(NUMBERS.cdiv)
        self.functions: dict[tuple[str, str], Callable[..., Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in ("register", "autotune", "aot_impl"):
            raise AttributeError(name)

        def keep(plugin: str) -> Callable[..., None]:
            def decorate(function: Callable[..., Any]) -> None:
                assert (plugin, name) not in self.functions, "TensorRT refuses a second one"
                self.functions[plugin, name] = function

            return decorate

        return keep


class TensorRT(ModuleType):
    """What of `tensorrt` registering takes."""

    DataType = SimpleNamespace(FLOAT="FLOAT", HALF="HALF", INT32="INT32", BOOL="BOOL")
    QuickPluginCreationRequest = None

    def __init__(self, known: Sequence[str] = ()) -> None:
        super().__init__("standin_tensorrt")
        self.plugin = Declared("standin_tensorrt.plugin")
        self.get_plugin_registry = lambda: SimpleNamespace(
            get_creator=lambda name, version, namespace: f"{namespace}::{name}" in known or None
        )


def flavor_of(trt: Any, name: str = "tensorrt", version: str = "10.9.0") -> Flavor:
    return Flavor(name, trt, version, None, deque(), [])


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    module = TensorRT()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, module.plugin.__name__, module.plugin)
    monkeypatch.setattr(
        compile, "ptx", lambda source, capability: f"{source} {capability}".encode()
    )
    return module


def tensor(shape: Sequence[int], kind: str, layout: str = "LINEAR") -> SimpleNamespace:
    """A TensorDesc whose concrete shape is dynamic, up to `shape`."""
    return SimpleNamespace(
        shape_expr=[Dim(size) for size in shape],
        shape=SimpleNamespace(is_dynamic=True, max=tuple(shape)),
        dtype=SimpleNamespace(name=kind),
        format=SimpleNamespace(name=layout),
    )


def arrays(values: dict[str, Any]) -> dict[str, Any]:
    """Attributes as TensorRT hands them over."""
    return {
        name: np.atleast_1d(np.array(v, np.float32 if isinstance(v, float) else np.int32))
        for name, v in values.items()
    }


@st.composite
def roi_align_inputs(draw: st.DrawFn) -> list[TensorDesc]:
    kind, layout = draw(st.sampled_from([formats[0] for formats in PyramidRoiAlignOp.formats]))
    batch, channels = draw(st.integers(1, 8)), draw(st.integers(1, 300))
    sides = draw(st.lists(st.integers(1, 400), min_size=8, max_size=8))
    maps = [
        TensorDesc((batch, channels, *sides[2 * k : 2 * k + 2]), kind, layout) for k in range(4)
    ]
    return [*maps, TensorDesc((batch, draw(counts), 4), "FLOAT", "LINEAR")]


@st.composite
def nms_inputs(draw: st.DrawFn) -> list[TensorDesc]:
    rows, boxes = draw(counts), draw(st.integers(1, 4000))
    return [
        TensorDesc((rows, boxes, 4), "FLOAT", "LINEAR"),
        TensorDesc((rows, boxes), "INT32", "LINEAR"),
    ]


def words_of(inputs: list[TensorDesc]) -> TensorDesc:
    """What the first node of NMS gives to the second one."""
    shapes = [desc.shape for desc in inputs]
    math = DimensionMath(int, operator.mul, NUMBERS.cdiv)
    shape = NmsOverlapsOp(0.5).output_shape(shapes, math)
    return TensorDesc(tuple(shape), "INT32", "LINEAR")


@FEW
@given(st.integers(1, 28), st.floats(32, 512, width=32), roi_align_inputs())
def test_roi_aligns_symbolic_launch_is_its_launch(
    size: int, canonical: float, inputs: list[TensorDesc]
) -> None:
    same_launch(PyramidRoiAlignOp(size, 2, canonical), inputs)


@FEW
@given(st.floats(0, 1), nms_inputs())
def test_nms_symbolic_launch_is_its_launch(threshold: float, inputs: list[TensorDesc]) -> None:
    same_launch(NmsOverlapsOp(threshold), inputs)
    same_launch(NmsKeepOp(), [words_of(inputs)])


def same_launch(op: Op, inputs: list[TensorDesc]) -> None:
    expected = op.launch(inputs)
    found = symbolic_launch(op, inputs, NUMBERS)
    assert dataclasses.replace(found, entry=expected.entry) == expected


@pytest.mark.parametrize("kind", ["FLOAT", "HALF"])
def test_what_tensorrt_is_told_of_roi_align(trt: TensorRT, kind: str) -> None:
    register_aot_plugins(flavor_of(trt), 86)
    declared = {
        role: trt.plugin.functions["comask::PyramidRoiAlign", role]
        for role in ("register", "autotune", "aot_impl")
    }
    parameters = inspect.signature(declared["register"]).parameters
    assert list(parameters)[5:] == list(ROI_ALIGN)
    assert list(inspect.signature(declared["aot_impl"]).parameters)[8:] == ["outputs", "tactic"]
    shapes = [(2, 12, 64 >> k, 96 >> k) for k in range(4)]
    inputs = [*(tensor(shape, kind) for shape in shapes), tensor((2, 50, 4), "FLOAT")]
    values = arrays(ROI_ALIGN)
    assert declared["register"](*inputs, **values) == ([100, 12, 7, 7], kind)

    name, layout = ("FP32", "HWC") if kind == "FLOAT" else ("FP16", "HWC8")
    types = [name] * 4 + ["FP32", name]
    assert declared["autotune"](*inputs, None) == [
        (types, ["LINEAR"] * 6),
        (types, [layout] * 4 + ["LINEAR", layout]),
    ]
    for inputs[:4] in ([tensor(s, kind, chosen) for s in shapes] for chosen in ("LINEAR", layout)):
        arguments = (*inputs, *values.values(), None, 0)
        entry, ptx, parameters, integers = declared["aot_impl"](*arguments)
        expected = PyramidRoiAlignOp(7, 2, 224.0).launch(
            [TensorDesc(d.shape.max, d.dtype.name, d.format.name) for d in inputs]
        )
        assert entry == expected.entry
        assert ptx == b"pyramid_roi_align 86"
        assert Dim(parameters.grid_x).value == expected.grid
        assert Dim(parameters.block_x).value == expected.block
        assert [number.value for number in integers] == list(expected.integers)


def test_what_tensorrt_is_told_of_nms(trt: TensorRT) -> None:
    register_aot_plugins(flavor_of(trt), 86)
    inputs = [tensor((3, 200, 4), "FLOAT"), tensor((3, 200), "INT32")]
    functions, threshold = trt.plugin.functions, arrays({"iou_threshold": 0.5})
    told = functions["comask::NmsOverlaps", "register"](*inputs, **threshold)
    assert told == ([3, 7, 200], "INT32")
    assert functions["comask::NmsOverlaps", "autotune"](*inputs, None) == [
        (["FP32", "INT32", "INT32"], ["LINEAR"] * 3)
    ]
    arguments = (*inputs, *threshold.values(), None, 0)
    entry, _, parameters, integers = functions["comask::NmsOverlaps", "aot_impl"](*arguments)
    assert (entry, parameters.grid_x.value, parameters.block_x) == ("nms_overlaps", 3 * 28, 32)
    assert [number.value for number in integers] == [3, 200, 0x3F000000]

    words = tensor((3, 7, 200), "INT32")
    assert functions["comask::NmsKeep", "register"](words) == ([3, 200], "BOOL")
    assert functions["comask::NmsKeep", "autotune"](words, None) == [
        (["INT32", "BOOL"], ["LINEAR"] * 2)
    ]
    entry, _, parameters, integers = functions["comask::NmsKeep", "aot_impl"](words, None, 0)
    assert (entry, parameters.grid_x.value, parameters.block_x) == ("nms_keep", 3, 256)
    assert [number.value for number in integers] == [3, 200]


@pytest.mark.parametrize("op", [PyramidRoiAlignOp(7, 2, 224.0), NmsOverlapsOp(0.5), NmsKeepOp()])
def test_the_kernels_take_what_the_launch_gives(op: Op) -> None:
    """Of each format's entry the PTX has inputs, integers and an output, in that number."""
    try:
        text = compile.ptx(op.kernel, 80).decode()
    except KernelError as error:
        pytest.skip(str(error))
    shapes = {
        "PyramidRoiAlign": [*((1, 8, 32 >> k, 32 >> k) for k in range(4)), (1, 9, 4)],
        "NmsOverlaps": [(1, 9, 4), (1, 9)],
        "NmsKeep": [(1, 1, 9)],
    }[op.name]
    for formats in op.formats:
        descs = [TensorDesc(s, *f) for s, f in zip(shapes, formats[:-1], strict=True)]
        launch = op.launch(descs)
        (parameters,) = text.split(f".entry {launch.entry}(")[1:]
        sizes = re.findall(r"\.param \.[ubs](32|64)", parameters.partition(")")[0])
        assert sizes == ["64"] * len(shapes) + ["32"] * len(launch.integers) + ["64"]


def test_a_launch_that_cannot_be_is_told(trt: TensorRT) -> None:
    flavor = flavor_of(trt)
    register_aot_plugins(flavor, 86)
    inputs = [*(tensor((1, 8, 8, 8), "FLOAT") for _ in range(4)), tensor((1, 5, 4), "FLOAT")]
    values = arrays(ROI_ALIGN | {"output_size": 65})
    launch = trt.plugin.functions["comask::PyramidRoiAlign", "aot_impl"]
    with pytest.raises(KernelError, match="output_size=65"):
        launch(*inputs, *values.values(), None, 0)
    assert len(flavor.plugin_errors) == 1
    assert "output_size=65" in flavor.plugin_errors[0]


def test_registered_once(trt: TensorRT) -> None:
    flavor = flavor_of(trt)
    register_aot_plugins(flavor, 86)
    register_aot_plugins(flavor, 86)
    assert len(trt.plugin.functions) == 9
    with pytest.raises(EngineError, match="another comask::NmsKeep already"):
        register_aot_plugins(flavor_of(TensorRT(["comask::NmsKeep"])), 86)


def test_who_has_no_aot_plugins() -> None:
    older = ModuleType("tensorrt")
    with pytest.raises(EngineError, match=r"10\.9 or newer, 10\.8\.0\.43 is installed"):
        check_aot(flavor_of(older, version="10.8.0.43"))
    for flavor, text in (
        (flavor_of(older), "10.9 or newer"),
        (flavor_of(TensorRT(), "tensorrt-rtx"), "no ahead-of-time plugins"),
    ):
        with pytest.raises(EngineError, match=text):
            check_options(flavor, "aot", BuildOptions(), H100)
    check_options(flavor_of(TensorRT()), "aot", BuildOptions(), H100)
    with pytest.raises(EngineError, match="'cubin': expected one of python, aot, none"):
        check_options(flavor_of(TensorRT()), "cubin", BuildOptions(), H100)


@pytest.mark.parametrize(
    ("compatibility", "capability"),
    [(None, 90), ("same_compute_capability", 90), ("ampere_plus", 80)],
)
def test_ptx_is_for_all_gpus_that_the_plan_is_for(
    trt: TensorRT, monkeypatch: pytest.MonkeyPatch, compatibility: str | None, capability: int
) -> None:
    monkeypatch.setattr(engine_process, "find_gpu", lambda: H100)
    compiled = []
    monkeypatch.setattr(compile, "ptx", lambda *arguments: compiled.append(arguments))
    options = BuildOptions(hardware_compatibility=compatibility)
    engine_process._register(flavor_of(trt), "aot", options)
    assert compiled == [("pyramid_roi_align", capability), ("sorted_nms", capability)]
