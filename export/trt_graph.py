"""Passes that make an exported graph one that TensorRT and TensorRT-RTX parse; in memory, never on disk.

The exported file holds each custom op as a node of domain `comask` with a function of standard ops.
TensorRT inlines a function rather than take the plugin of its name, and the functions that suit ONNX
Runtime use ops that TensorRT-RTX lacks.
"""

from __future__ import annotations

import onnx
import onnx.inliner

from comask.export.functions import DOMAIN
from comask.export.trt_functions import tensorrt_functions
from comask.runtime.trt.ops import check_fixed


def with_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose custom nodes have no function, so that TensorRT looks for their plugins.

    The nodes carry `plugin_namespace` and `plugin_version`.

    Raises:
        EngineError: for a custom node that our kernels do not compute.
    """
    for node in model.graph.node:
        if node.domain == DOMAIN:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            lists_as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            check_fixed(node.op_type, lists_as_tuples)
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    _remove_functions(stripped)
    return stripped


def without_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with standard ops in place of the custom nodes, all of which TensorRT-RTX builds.

    It has no NonZero, NonMaxSuppression or RoiAlign. Counting in NMS is an f16 product: for Turing (SM75)
    TensorRT-RTX builds no GEMM in fp32, so there it builds the fp16 graphs alone.
    """
    replaced = onnx.ModelProto()
    replaced.CopyFrom(model)
    _remove_functions(replaced)
    functions = tensorrt_functions()
    replaced.functions.extend(functions)
    inlined = onnx.inliner.inline_selected_functions(
        replaced, [(f.domain, f.name) for f in functions]
    )
    _remove_functions(inlined)
    kept = [entry for entry in inlined.opset_import if entry.domain != DOMAIN]
    del inlined.opset_import[:]
    inlined.opset_import.extend(kept)
    return inlined


def _remove_functions(model: onnx.ModelProto) -> None:
    """Drops the functions of the custom ops."""
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
