"""Precisions asked by a graph and read back from what was built."""

from __future__ import annotations

import json
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from comask.errors import EngineError
from comask.export.layer_precision import asked_precisions, check_precisions, engine_layers
from comask.runtime.trt.engine_folder import LayerCounts

ASKED = {"conv": "fp16", "gemm": "fp16", "int": "int8", "float": "fp32"}
AS_ASKED = dict(ASKED)


def layer(nodes: list[str], inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    """A layer as TensorRT's inspector describes it in JSON."""
    return {
        "Name": " + ".join(nodes),
        "Inputs": [{"Name": "a", "Format/Datatype": kind} for kind in inputs],
        "Outputs": [{"Name": "b", "Format/Datatype": kind} for kind in outputs],
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def test_the_graph_asks_by_the_type_of_its_weights() -> None:
    def weights(name: str, kind: int) -> onnx.TensorProto:
        return helper.make_tensor(name, kind, [1, 1, 1, 1], [1])

    nodes = [
        helper.make_node("Conv", ["x", "half"], ["y"], name="conv"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["dq"], name="dq"),
        helper.make_node("Conv", ["x", "dq"], ["z"], name="int"),
        helper.make_node("Conv", ["x", "full"], ["w"], name="float"),
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
    ]
    initializers = [
        weights("half", TensorProto.FLOAT16), weights("full", TensorProto.FLOAT),
        weights("q", TensorProto.INT8), helper.make_tensor("scale", TensorProto.FLOAT, [], [1]),
    ]  # fmt: skip
    graph = helper.make_graph(nodes, "g", [], [], initializer=initializers)
    asked = asked_precisions(helper.make_model(graph))
    assert asked == {"conv": "fp16", "int": "int8", "float": "fp32"}


def test_what_is_as_asked_is_counted() -> None:
    found = check_precisions(ASKED, AS_ASKED | {"other": "fp32"}, {"conv": "fp16"})
    network = {"fp16": 2, "fp32": 1, "int8": 1}
    assert found == LayerCounts(of=4, network=network, engine={"fp16": 1})
    assert check_precisions(ASKED, AS_ASKED, None).engine is None


def test_another_precision_of_the_parsed_network_fails() -> None:
    with pytest.raises(EngineError, match=r"1 layers of the network.*gemm is fp32, expected fp16"):
        check_precisions(ASKED, AS_ASKED | {"gemm": "fp32"}, AS_ASKED)


def test_what_the_inspector_says_of_an_engine_rejects_no_build() -> None:
    found = check_precisions(ASKED, AS_ASKED, AS_ASKED | {"gemm": "fp32", "other": "fp32"})
    assert found.differing == {"gemm": "fp32"}
    assert check_precisions(ASKED, AS_ASKED, AS_ASKED).differing == {}


def test_names_that_nobody_knows_are_no_proof() -> None:
    with pytest.raises(EngineError, match="only 0 of 4 layers could be read back"):
        check_precisions(ASKED, {"renamed": "fp16"}, None)


def test_an_engines_layers_by_the_inspectors_json() -> None:
    information = {
        "Layers": [
            layer(["conv"], ["Channel major FP16 format where channel % 8 == 0"],
                  ["Row major linear FP16 format"]),
            # fused layers show the types of their edges only: no verdict
            layer(["inner", "relu"], ["Row major linear FP32"], ["Row major linear FP32"]),
            layer(["gemm"], ["Half"], ["Half"]),
            layer(["int"], ["Four wide channel vectorized row major Int8 format"], ["Int8"]),
            layer(["mixed"], ["Row major linear FP32", "Half"], ["Half"]),  # contains a cast
            layer(["images"], ["Row major linear UInt8 format"], ["Half"]),  # UInt8 is not Int8
            "a name alone",
            {"Name": "no tensors"},
        ]
    }  # fmt: skip
    assert engine_layers(json.dumps(information)) == {
        "conv": "fp16", "gemm": "fp16", "int": "int8", "images": "fp16",
    }  # fmt: skip
