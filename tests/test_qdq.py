"""Q/DQ placement against the arithmetic that it stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from comask.bundle import STAGES, graph_file
from comask.calib.qdq import LARGEST, activations, graph_layers, quantize_graph, readings
from comask.export.layer_precision import asked_precisions
from comask.runtime.backends.ort import OrtSession


def fake_quantized(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x / scale), -LARGEST - 1, LARGEST) * scale


def rounded_up(scale: np.ndarray, dtype: str) -> np.ndarray:
    stored = scale.astype(dtype)
    stored = np.where(stored < scale, np.nextafter(stored, np.array(np.inf, dtype)), stored)
    return stored.astype(np.float64)


def conv_graph(weights: np.ndarray, transposed: bool) -> onnx.ModelProto:
    """`x` → a convolution without padding → `y`."""
    rank = TensorProto.FLOAT if weights.dtype == np.float32 else TensorProto.FLOAT16
    kind = "ConvTranspose" if transposed else "Conv"
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "model.head.weight"], ["y"])], "g",
        [helper.make_tensor_value_info("x", rank, [1, weights.shape[0 if transposed else 1], 6, 6])],
        [helper.make_tensor_value_info("y", rank, [1, "c", "h", "w"])],
        [numpy_helper.from_array(weights, "model.head.weight")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@given(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.floats(1e-3, 1e3),
    st.sampled_from([1, 1e-4]),
    st.sampled_from(["f4", "f2"]),
)
def test_a_layer_computes_what_the_formula_says(
    seed: int, transposed: bool, size: float, small: float, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    weights = (small * rng.normal(size=(3, 4, 2, 2))).astype(dtype)
    weights[0] *= 0  # a dead channel, in or out
    x = (size * rng.normal(size=(1, weights.shape[0 if transposed else 1], 6, 6))).astype(dtype)
    largest = float(np.abs(x).max()) * 0.8
    model = conv_graph(weights, transposed)
    quantized = quantize_graph(model, {"head": largest}, {"head"})
    onnx.checker.check_model(quantized)
    found = OrtSession(quantized.SerializeToString(), "cpu", optimized=False).run({"x": x})["y"]

    axis = 1 if transposed else 0
    others = tuple(i for i in range(4) if i != axis)
    peak = np.abs(weights.astype(float)).max(axis=others, keepdims=True)
    # the scale is stored in the graph's own type
    scale = rounded_up(np.where(peak > 0, peak / LARGEST, 1), dtype)
    rounded = fake_quantized(weights.astype(np.float64), scale)
    assert (np.abs(rounded - weights) <= scale * 0.5001).all()
    x_scale = rounded_up(np.array(largest / LARGEST), dtype)
    inputs = fake_quantized(x.astype(np.float64), x_scale)
    reference = conv_graph(rounded.astype(np.float32), transposed)
    expected = OrtSession(reference.SerializeToString(), "cpu").run({"x": inputs.astype("f4")})["y"]
    error = 1e-5 if dtype == "f4" else 5e-3
    np.testing.assert_allclose(found, expected, rtol=error, atol=error * np.abs(expected).max())


@pytest.mark.parametrize("stage", STAGES)
def test_readings_of_exported_graphs(micro_fp16: Path, stage: str) -> None:
    names = {}
    for precision in ("fp32", "fp16"):
        model = onnx.load(micro_fp16 / graph_file(stage, precision))
        names[precision] = list(activations(model)), [layer.name for layer in graph_layers(model)]
        places = [reading.node for reading in readings(model)]
        assert places == sorted(places)
    assert {*names["fp32"][0]} == {*names["fp16"][0]}
    assert names["fp32"][1] == names["fp16"][1]
    if stage == "stage1":
        shortcuts = [name for name in names["fp16"][0] if name.endswith("+")]
        assert len(shortcuts) == 8  # two blocks in each of four stages of a ResNet-18
        assert "rpn.conv:4" in names["fp16"][0]  # the fifth level
        assert not any("attention" in name for name in names["fp16"][1])
    else:
        assert {"classifier.fc1", "head.refine.0", "head.refine.0:1"} <= {*names["fp16"][0]}


@pytest.mark.parametrize("stage", STAGES)
def test_chosen_layers_alone_become_int8(micro_fp16: Path, stage: str) -> None:
    model = onnx.load(micro_fp16 / graph_file(stage, "fp16"))
    layers = graph_layers(model)
    chosen = {layer.name for layer in layers[::2]}
    quantized = quantize_graph(model, dict.fromkeys(activations(model), 4.0), chosen)
    onnx.checker.check_model(quantized, full_check=True)
    asked = asked_precisions(quantized)
    for layer in layers:
        kinds = {asked[model.graph.node[place].name] for place in layer.nodes}
        assert kinds == {"int8" if layer.name in chosen else "fp16"}
    initializers = {tensor.name: tensor for tensor in quantized.graph.initializer}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear":
            assert not numpy_helper.to_array(initializers[node.input[2]]).any()
    stored = {t.name for t in initializers.values() if t.data_type == TensorProto.INT8}
    assert {f"{layer.weight}.int8" for layer in layers if layer.name in chosen} <= stored
    assert not any(layer.weight in initializers for layer in layers if layer.name in chosen)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        quantized.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def test_no_layers_leave_the_graph_as_it_is(micro_fp16: Path) -> None:
    model = onnx.load(micro_fp16 / graph_file("stage2", "fp16"))
    assert quantize_graph(model, {}, ()) == model
