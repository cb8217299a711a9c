"""Defines the custom ops in standard ops that TensorRT and TensorRT-RTX can build on any machine.

Engines without plugins use them. TensorRT-RTX has no NonZero and no NonMaxSuppression, and its RoiAlign
does not parse without a GPU. ONNX Runtime uses the bodies in `comask.export.functions` instead, which it
runs three to five times as fast (docs/bundle.md).

Legend: B images with N RoIs each, C channels, S output size, r samples per bin and axis.
"""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx.parser

from comask.export.functions import DOMAIN, REACHED_LEVELS, sorted_nms_function
from comask.models.roi_align import LEVEL_FACTORS, STRIDES
from comask.runtime.trt.ops import NmsKeepOp, NmsOverlapsOp, check_fixed

# One GridSample samples all levels, because they are put into one image, the atlas: P2, and to its right
# P3 above P4 above P5, which together have 7/8 of P2's height. Positions are clamped to their level
# first. At a level's border, the tap outside has weight zero, so neighbouring levels have no influence.
ATLAS = """
<domain: "comask", opset_import: ["": 20]>
PyramidRoiAlign <output_size, sampling_ratio, canonical_size> (p2, p3, p4, p5, rois) => (pooled)
{
    no = Constant <value_ints = [0]> ()
    axis_2 = Constant <value_ints = [2]> ()
    axis_3 = Constant <value_ints = [3]> ()
    h2 = Shape <start = 2, end = 3> (p2)
    w2 = Shape <start = 3, end = 4> (p2)
    h3 = Shape <start = 2, end = 3> (p3)
    w3 = Shape <start = 3, end = 4> (p3)
    h4 = Shape <start = 2, end = 3> (p4)
    w4 = Shape <start = 3, end = 4> (p4)
    h5 = Shape <start = 2, end = 3> (p5)
    w5 = Shape <start = 3, end = 4> (p5)
    h34 = Add (h3, h4)
    h345 = Add (h34, h5)
    beside_4 = Sub (w3, w4)
    beside_5 = Sub (w3, w5)
    beneath = Sub (h2, h345)
    pads_4 = Concat <axis = 0> (no, beside_4)
    pads_5 = Concat <axis = 0> (no, beside_5)
    pads_beneath = Concat <axis = 0> (no, beneath)
    wide_4 = Pad (p4, pads_4, , axis_3)
    wide_5 = Pad (p5, pads_5, , axis_3)
    coarse = Concat <axis = 2> (p3, wide_4, wide_5)
    coarse_padded = Pad (coarse, pads_beneath, , axis_2)
    atlas_half = Concat <axis = 3> (p2, coarse_padded)
    atlas = Cast <to = 1> (atlas_half)
"""

# Like comask.models.roi_align.roi_levels; then the scale, size and origin of each RoI's level, [B, N, 1].
LEVEL = (
    """
    zero_f = Constant <value_float = 0.0> ()
    half = Constant <value_float = 0.5> ()
    one_f = Constant <value_float = 1.0> ()
    minus_one_f = Constant <value_float = -1.0> ()
    two_f = Constant <value_float = 2.0> ()
    x1, y1, x2, y2 = Split <axis = 2, num_outputs = 4> (rois)
"""
    + REACHED_LEVELS
    + """    level = ReduceSum <keepdims = 1> (reached_int, axis_2)

    scales = Constant <value_floats = [{scales}]> ()
    widths_int = Concat <axis = 0> (w2, w3, w4, w5)
    heights_int = Concat <axis = 0> (h2, h3, h4, h5)
    lefts_int = Concat <axis = 0> (no, w2, w2, w2)
    tops_int = Concat <axis = 0> (no, no, h3, h34)
    widths = Cast <to = 1> (widths_int)
    heights = Cast <to = 1> (heights_int)
    lefts = Cast <to = 1> (lefts_int)
    tops = Cast <to = 1> (tops_int)
    scale = Gather (scales, level)
    length_x = Gather (widths, level)
    length_y = Gather (heights, level)
    origin_x = Gather (lefts, level)
    origin_y = Gather (tops, level)

    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    size = Constant <value_int: int = @output_size> ()
    ratio = Constant <value_int: int = @sampling_ratio> ()
    size_1 = Unsqueeze (size, no)
    ratio_1 = Unsqueeze (ratio, no)
    size_f = Cast <to = 1> (size)
    ratio_f = Cast <to = 1> (ratio)
    samples = Mul (size, ratio)
    sample = Range (first, samples, step)
    bin_int = Div (sample, ratio)
    part_int = Mod (sample, ratio)
    bin = Cast <to = 1> (bin_int)
    part = Cast <to = 1> (part_int)
    part_middle = Add (part, half)
    same_2 = Constant <value_ints = [0, 0]> ()
    by_bin = Concat <axis = 0> (same_2, size_1, ratio_1)
"""
)

# Sample positions along one axis, in torchvision's order of operations, [B, N, S·r]; then [B, r, N, S]
# with the axes of the other direction inserted. GridSample's -1 and 1 are the atlas's outer pixels.
AXIS = """
    start_pixels_{a} = Mul ({a}1, scale)
    end_pixels_{a} = Mul ({a}2, scale)
    start_{a} = Sub (start_pixels_{a}, half)
    end_{a} = Sub (end_pixels_{a}, half)
    extent_{a} = Sub (end_{a}, start_{a})
    bin_size_{a} = Div (extent_{a}, size_f)
    before_bin_{a} = Mul (bin, bin_size_{a})
    bin_start_{a} = Add (start_{a}, before_bin_{a})
    parts_{a} = Mul (part_middle, bin_size_{a})
    in_bin_{a} = Div (parts_{a}, ratio_f)
    position_{a} = Add (bin_start_{a}, in_bin_{a})
    after_start_{a} = GreaterOrEqual (position_{a}, minus_one_f)
    before_end_{a} = LessOrEqual (position_{a}, length_{a})
    is_inside_{a} = And (after_start_{a}, before_end_{a})
    weight_{a} = Cast <to = 1> (is_inside_{a})

    last_{a} = Sub (length_{a}, one_f)
    at_least_0_{a} = Max (position_{a}, zero_f)
    clamped_{a} = Min (at_least_0_{a}, last_{a})
    place_{a} = Add (clamped_{a}, origin_{a})
    atlas_length_int_{a} = Shape <start = {axis}, end = {axis_after}> (atlas)
    atlas_length_{a} = Cast <to = 1> (atlas_length_int_{a})
    atlas_last_{a} = Sub (atlas_length_{a}, one_f)
    twice_{a} = Mul (place_{a}, two_f)
    share_{a} = Div (twice_{a}, atlas_last_{a})
    coordinate_{a} = Sub (share_{a}, one_f)

    between_{a} = Constant <value_ints = [{between}]> ()
    weight_bins_{a} = Reshape (weight_{a}, by_bin)
    weight_parts_{a} = Transpose <perm = [0, 3, 1, 2]> (weight_bins_{a})
    weights_{a} = Unsqueeze (weight_parts_{a}, between_{a})
    coordinate_bins_{a} = Reshape (coordinate_{a}, by_bin)
    coordinate_parts_{a} = Transpose <perm = [0, 3, 1, 2]> (coordinate_bins_{a})
    coordinates_{a} = Unsqueeze (coordinate_parts_{a}, between_{a})
"""

# The samples of a bin have an axis of their own, outside the RoIs, so that their mean is a mean of rows.
SAMPLE = """
    weights = Mul (weights_y, weights_x)
    everywhere = Shape (weights)
    grid_y = Expand (coordinates_y, everywhere)
    grid_x = Expand (coordinates_x, everywhere)
    rest = Constant <value_ints = [-1]> ()
    pair_y = Unsqueeze (grid_y, rest)
    pair_x = Unsqueeze (grid_x, rest)
    pairs = Concat <axis = -1> (pair_x, pair_y)
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    grid_shape = Concat <axis = 0> (no, rest, size_1, two)
    grid = Reshape (pairs, grid_shape)
    sampled = GridSample <mode = "linear", padding_mode = "border", align_corners = 1> (atlas, grid)

    weights_shape = Concat <axis = 0> (no, one, rest, size_1)
    weights_image = Reshape (weights, weights_shape)
    weighted = Mul (sampled, weights_image)
    ratio_squared = Mul (ratio_1, ratio_1)
    by_sample_shape = Concat <axis = 0> (same_2, ratio_squared, rest, size_1, size_1)
    by_sample = Reshape (weighted, by_sample_shape)
    mean = ReduceMean <keepdims = 0> (by_sample, axis_2)
    by_roi = Transpose <perm = [0, 2, 1, 3, 4]> (mean)
    channels = Shape <start = 1, end = 2> (p2)
    pooled_shape = Concat <axis = 0> (rest, channels, size_1, size_1)
    pooled_f = Reshape (by_roi, pooled_shape)
    pooled = CastLike (pooled_f, p2)
}
"""


def pyramid_roi_align_by_grid_sample() -> onnx.FunctionProto:
    """Returns `PyramidRoiAlign` by GridSample, which samples maps of any type in fp32."""
    text = ATLAS + LEVEL
    text += AXIS.format(a="y", axis=2, axis_after=3, between="2, 5")  # [B, r, 1, N, S, 1]
    text += AXIS.format(a="x", axis=3, axis_after=4, between="1, 4")  # [B, 1, r, N, 1, S]
    text += SAMPLE
    factors = ", ".join(f"{factor:.9g}" for factor in LEVEL_FACTORS)
    scales = ", ".join(str(1 / stride) for stride in STRIDES)
    return onnx.parser.parse_function(
        text.replace("{factors}", factors).replace("{scales}", scales)
    )


def tensorrt_functions() -> list[onnx.FunctionProto]:
    """Returns the functions of both ops."""
    return [
        pyramid_roi_align_by_grid_sample(),
        sorted_nms_function(count_type=onnx.TensorProto.FLOAT16),
    ]


def with_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy whose custom nodes have no function, so that TensorRT looks for their plugins.

    The nodes carry `plugin_namespace` and `plugin_version`. In place of a `SortedNms`, there are
    `NmsOverlaps` and `NmsKeep`, because a plugin starts one kernel.

    Raises:
        EngineError: comask's kernels do not compute one of the custom nodes.
    """
    for node in model.graph.node:
        if node.domain == DOMAIN:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            lists_as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            check_fixed(node.op_type, lists_as_tuples)
    stripped = _without_functions(model)
    _split_nms(stripped.graph)
    return stripped


def without_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy with standard ops in place of the custom nodes, all of which TensorRT-RTX can build.

    It has no NonZero, NonMaxSuppression or RoiAlign. NMS counts by an f16 product, since TensorRT-RTX
    has no fp32 GEMM for Turing (SM75); for the same reason it builds only fp16 graphs there.
    """
    replaced = _without_functions(model)
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


def _without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy without the functions of the custom ops, whose head computes all rows."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _keep_all_rows(copy.graph)
    _remove_functions(copy)
    return copy


def _keep_all_rows(graph: onnx.GraphProto) -> None:
    """Makes `CutRows` and `PadRows` the identity, since an engine has fixed shapes."""
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type in ("CutRows", "PadRows"):
            node.domain, node.op_type = "", "Identity"
            del node.input[1:], node.attribute[:]


def _split_nms(graph: onnx.GraphProto) -> None:
    """Replaces each `SortedNms` by the two ops of `comask.runtime.trt.ops`."""
    nodes = []
    for node in graph.node:
        if (node.domain, node.op_type) != (DOMAIN, "SortedNms"):
            nodes.append(node)
            continue
        overlaps, keep = onnx.NodeProto(), onnx.NodeProto()
        overlaps.CopyFrom(node)
        overlaps.name, overlaps.op_type = f"{node.name}/overlaps", NmsOverlapsOp.name
        overlaps.output[:] = [f"{node.output[0]}/overlaps"]
        keep.CopyFrom(node)
        keep.name, keep.op_type = f"{node.name}/keep", NmsKeepOp.name
        keep.input[:] = overlaps.output
        del keep.attribute[:]
        keep.attribute.extend(a for a in node.attribute if a.name.startswith("plugin_"))
        nodes += [overlaps, keep]
    del graph.node[:]
    graph.node.extend(nodes)


def _remove_functions(model: onnx.ModelProto) -> None:
    """Removes the functions of the custom ops."""
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
