"""Are the weights in the graphs those of the network?

A wrong weight need not show in any output: a normalisation behind it cancels a factor, and a channel may
be dead on the images at hand. So the numbers themselves are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np

from comask.bundle import STAGES, Bundle
from comask.runtime.compare import relative_error
from comask.runtime.session import Array

if TYPE_CHECKING:
    import onnx

    from comask.models.comask import CoMask

# Relative to a tensor's largest value. BatchNorm is folded in another order; f16 rounds by 2^-11, and
# int8's codes by half of 1/127 of a channel's largest value.
LIMITS = {"fp32": 1e-5, "fp16": 1e-3, "int8": 5e-3}


def altered_weights(model: CoMask, bundle: Bundle, precision: str) -> list[str]:
    """One sentence a tensor of the graphs that differs from the network's.

    Scales and shifts of GroupNorm have other shapes in graphs, and are not compared.

    Args:
        model: fp32, in evaluation mode.
        bundle: with the graphs.
        precision: of the graphs.

    Raises:
        BundleError: when a graph is missing or altered.
    """
    import onnx

    from comask.models.backbone import fold_batch_norms

    network = deepcopy(model).cpu()
    fold_batch_norms(network.backbone)  # as in the graphs
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    expected = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    limit = LIMITS[precision]
    found = []
    for stage in STAGES:
        for name, value in _weights(onnx.load(bundle.graph(stage, precision))):
            error = relative_error(expected[name], value) if name in expected else float("inf")
            if not error <= limit:
                found.append(
                    f"{name} in {stage} is not the network's: off by {error:.2g} of its largest value, "
                    f"at most {limit:g} expected in {precision}"
                )
    return found


def _weights(model: onnx.ModelProto) -> Iterator[tuple[str, Array]]:
    """Tensors of a graph by their names in the network, f32; int8 ones dequantised."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    axes: Mapping[str, int] = {
        node.input[0]: attribute.i
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        for attribute in node.attribute
        if attribute.name == "axis"
    }
    for name, tensor in tensors.items():
        if not name.startswith("model.") or name.endswith((".scale", ".zero_point")):
            continue
        value = np.asarray(numpy_helper.to_array(tensor), np.float32)
        plain = name.removesuffix(".int8")
        if plain != name:
            scale = np.asarray(numpy_helper.to_array(tensors[f"{plain}.scale"]), np.float32)
            shape = [1] * value.ndim
            shape[axes[name]] = -1
            value = value * scale.reshape(shape)
        yield plain.removeprefix("model.").replace(".weight_bias", ".bias"), value
