"""A network that does next to nothing, where what surrounds it is to be tested many times over."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from comask.bundle import STAGES, Bundle, graph_file, sha256, write_manifest

FOUND, DETECTIONS, PROPOSALS, CELLS = 2, 3, 4, 28
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
TYPES = {"uint8": onnx.TensorProto.UINT8, "int32": onnx.TensorProto.INT32,
         "float32": onnx.TensorProto.FLOAT}  # fmt: skip


def hollow_out(folder: str | Path) -> None:
    """Puts graphs into a bundle that say one thing of an image: the red of its first pixel.

    Each has `FOUND` instances, whose scores are that red / 256, and discs for masks.
    """
    bundle = Bundle.open(Path(folder))
    graphs = json.loads(json.dumps(bundle.manifest.graphs))
    for stage in STAGES:
        for entry in (*graphs[stage]["inputs"], *graphs[stage]["outputs"]):
            if entry["name"] in STRIDES:
                entry["shape"][1] = 1
    files = dict(bundle.manifest.files)
    for stage, (nodes, constants, outputs) in zip(STAGES, (_stage1(), _stage2()), strict=True):
        inputs = [
            helper.make_tensor_value_info(e["name"], TYPES[e["dtype"]], e["shape"])
            for e in graphs[stage]["inputs"]
        ]
        kept = [
            helper.make_tensor_value_info(name, TYPES[kind], shape)
            for name, (kind, shape) in outputs.items()
        ]
        tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
        graph = helper.make_graph(nodes, stage, inputs, kept, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 9
        onnx.checker.check_model(model)
        path = bundle.folder / graph_file(stage, "fp32")
        onnx.save(model, path)
        files[path.name] = sha256(path)
    manifest = dataclasses.replace(bundle.manifest, graphs=graphs, files=files)
    write_manifest(bundle.folder, manifest)


Graph = tuple[list[Any], dict[str, Any], dict[str, tuple[str, list[Any]]]]


def _stage1() -> Graph:
    """Every so many pixels as the maps; the red as proposals."""
    node = helper.make_node
    constants: dict[str, Any] = {
        "start": np.zeros(3, np.int64), "one": np.ones(3, np.int64), "axes": np.arange(1, 4),
        "ones": np.ones((1, PROPOSALS, 4), np.float32), "column": np.array([-1, 1, 1]),
        "row_ones": np.ones((1, PROPOSALS), np.float32), "flat": np.array([-1, 1]),
        "end": np.array([2**31, 2**31, 1]),
    }  # fmt: skip
    nodes = [
        node("Slice", ["images", "start", "one", "axes"], ["pixel"]),
        node("Cast", ["pixel"], ["red"], to=onnx.TensorProto.FLOAT),
        node("Reshape", ["red", "column"], ["reds"]),
        node("Mul", ["reds", "ones"], ["proposals"]),
        node("Reshape", ["red", "flat"], ["row"]),
        node("Mul", ["row", "row_ones"], ["proposal_scores"]),
    ]
    for name, stride in STRIDES.items():
        constants[f"{name}_steps"] = np.array([stride, stride, 1])
        nodes += [
            node("Slice", ["images", "start", "end", "axes", f"{name}_steps"], [f"{name}_some"]),
            node("Transpose", [f"{name}_some"], [f"{name}_planes"], perm=[0, 3, 1, 2]),
            node("Cast", [f"{name}_planes"], [name], to=onnx.TensorProto.FLOAT),
        ]
    outputs: dict[str, tuple[str, list[Any]]] = {
        name: ("float32", ["batch", 1, f"{name}_h", f"{name}_w"]) for name in STRIDES
    }
    outputs["proposals"] = ("float32", ["batch", PROPOSALS, 4])
    outputs["proposal_scores"] = ("float32", ["batch", PROPOSALS])
    return nodes, constants, outputs


def _stage2() -> Graph:
    """The same detections for all, but for their scores."""
    node = helper.make_node
    y, x = np.mgrid[:CELLS, :CELLS] - (CELLS - 1) / 2
    disc = (1 / (1 + np.exp(np.hypot(x, y) - CELLS / 3))).astype(np.float32)
    boxes = np.array([[3, 2, 27, 29], [8.3, 9.7, 20.1, 30.9], [0, 0, 9, 9]], np.float32)
    constants: dict[str, Any] = {
        "boxes_of_all": boxes[None], "masks_of_all": np.stack([disc] * DETECTIONS)[None],
        "labels_of_all": np.zeros((1, DETECTIONS), np.int32), "found": np.array([FOUND], np.int32),
        "shares": np.full((1, DETECTIONS), 1 / 256, np.float32), "scalar": np.array([-1]),
        "first": np.array([0, 0]), "behind": np.array([1, 1]), "axes": np.array([1, 2]),
        "row": np.array([-1, 1]), "mask": np.array([-1, 1, 1, 1]),
        "nothing": np.zeros(1, np.float32),
    }  # fmt: skip
    nodes = [
        node("Slice", ["proposals", "first", "behind", "axes"], ["red"]),
        node("Reshape", ["red", "row"], ["red_row"]),
        node("Mul", ["red_row", "shares"], ["scores"]),
        node("Mul", ["red", "nothing"], ["zero"]),
        node("Add", ["zero", "boxes_of_all"], ["boxes"]),
        node("Reshape", ["zero", "mask"], ["zero_mask"]),
        node("Add", ["zero_mask", "masks_of_all"], ["masks"]),
        node("Cast", ["zero"], ["zero_integer"], to=onnx.TensorProto.INT32),
        node("Reshape", ["zero_integer", "row"], ["zero_row"]),
        node("Add", ["zero_row", "labels_of_all"], ["labels"]),
        node("Reshape", ["zero_integer", "scalar"], ["zero_count"]),
        node("Add", ["zero_count", "found"], ["num_detections"]),
    ]
    return nodes, constants, {
        "num_detections": ("int32", ["batch"]),
        "boxes": ("float32", ["batch", DETECTIONS, 4]),
        "scores": ("float32", ["batch", DETECTIONS]),
        "labels": ("int32", ["batch", DETECTIONS]),
        "masks": ("float32", ["batch", DETECTIONS, CELLS, CELLS]),
    }  # fmt: skip
