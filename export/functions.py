"""Defines the custom ops as ONNX functions of standard ops.

The exported file contains them, so that any ONNX Runtime can run it without plugins. Tests compare each
function with its counterpart in `comask.models`.

Legend: G rows of M boxes; B images with N RoIs each, R = B·N; C channels, S output size.
"""

from __future__ import annotations

import onnx
import onnx.parser

from comask.models.roi_align import LEVEL_FACTORS, STRIDES

DOMAIN = "comask"
OPSET = 20  # Q/DQ with fp16 scales needs at least 19; TensorRT supports 20.

# keep = 1 if no kept box of higher rank suppresses the box. Iterated from all ones, a box is final once
# all boxes above it are final, so the fixed point is exactly greedy NMS.
SORTED_NMS = """
<domain: "comask", opset_import: ["": 20]>
SortedNms <iou_threshold> (boxes, group_ids) => (keep)
{
    threshold = Constant <value_float: float = @iou_threshold> ()
    zero = Constant <value_float = 0.0> ()
    half = Constant <value_float = 0.5> ()
    half_count = Cast <to = {count_type}> (half)
    axis_1 = Constant <value_ints = [1]> ()
    axis_2 = Constant <value_ints = [2]> ()

    x1, y1, x2, y2 = Split <axis = 2, num_outputs = 4> (boxes)
    width = Sub (x2, x1)
    height = Sub (y2, y1)
    area = Mul (width, height)
    x1_t = Transpose <perm = [0, 2, 1]> (x1)
    y1_t = Transpose <perm = [0, 2, 1]> (y1)
    x2_t = Transpose <perm = [0, 2, 1]> (x2)
    y2_t = Transpose <perm = [0, 2, 1]> (y2)
    area_t = Transpose <perm = [0, 2, 1]> (area)

    left = Max (x1, x1_t)
    top = Max (y1, y1_t)
    right = Min (x2, x2_t)
    bottom = Min (y2, y2_t)
    common_width = Sub (right, left)
    common_height = Sub (bottom, top)
    common_width_0 = Max (common_width, zero)
    common_height_0 = Max (common_height, zero)
    intersection = Mul (common_width_0, common_height_0)
    areas = Add (area, area_t)
    union = Sub (areas, intersection)
    iou = Div (intersection, union)
    overlaps = Greater (iou, threshold)

    group = Unsqueeze (group_ids, axis_2)
    group_t = Unsqueeze (group_ids, axis_1)
    same_group = Equal (group, group_t)
    rank_0 = Constant <value_int = 0> ()
    rank_step = Constant <value_int = 1> ()
    shape = Shape (group_ids)
    count = Gather (shape, rank_step)
    rank = Range (rank_0, count, rank_step)
    axis_0 = Constant <value_ints = [0]> ()
    rank_row = Unsqueeze (rank, axis_1)
    rank_column = Unsqueeze (rank, axis_0)
    higher = Less (rank_row, rank_column)
    rivals = And (overlaps, same_group)
    beats = And (rivals, higher)
    suppresses = Cast <to = {count_type}> (beats)

    nothing = Mul (x1_t, zero)
    false_row = Greater (nothing, half)
    true_row = Not (false_row)
    keep_all = Cast <to = {count_type}> (true_row)
    go_on = Constant <value = bool {1}> ()
    settled = Loop (count, go_on, keep_all) <
        body = settle (int64 step, bool unsettled, {count_name}["G", 1, "M"] keep_in)
            => (bool changed, {count_name}["G", 1, "M"] keep_out)
        {
            hits = MatMul (keep_in, suppresses)
            spared = Less (hits, half_count)
            keep_out = Cast <to = {count_type}> (spared)
            difference = Sub (keep_out, keep_in)
            distance = Abs (difference)
            moved = ReduceMax <keepdims = 0> (distance)
            changed = Greater (moved, half_count)
        }
    >
    settled_rows = Squeeze (settled, axis_1)
    keep = Greater (settled_rows, half_count)
}
"""

# Whether each RoI's side reaches each level's bound, like `roi_levels`; callers split RoIs and sum up.
REACHED_LEVELS = """\
    width = Sub (x2, x1)
    height = Sub (y2, y1)
    width_0 = Max (width, zero_f)
    height_0 = Max (height, zero_f)
    area = Mul (width_0, height_0)
    side = Sqrt (area)
    canonical = Constant <value_float: float = @canonical_size> ()
    factors = Constant <value_floats = [{factors}]> ()
    bounds = Mul (factors, canonical)
    reached = GreaterOrEqual (side, bounds)
    reached_int = Cast <to = 7> (reached)
"""

# Each RoI is pooled only from its own level; pooling all RoIs from all four levels would cost four times
# as much.
PYRAMID_ROI_ALIGN_HEAD = (
    """
<domain: "comask", opset_import: ["": 20]>
PyramidRoiAlign <output_size, sampling_ratio, canonical_size> (p2, p3, p4, p5, rois) => (pooled)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zero_f = Constant <value_float = 0.0> ()
    all_rows = Constant <value_ints = [-1]> ()
    rows_of_4 = Constant <value_ints = [-1, 4]> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    flat = Reshape (rois, rows_of_4)

    shape = Shape (rois)
    batch = Gather (shape, zero)
    batch_and_count = Shape <start = 0, end = 2> (rois)
    images = Range (zero, batch, one)
    images_column = Unsqueeze (images, axis_1)
    images_table = Expand (images_column, batch_and_count)
    image = Reshape (images_table, all_rows)

    x1, y1, x2, y2 = Split <axis = 1, num_outputs = 4> (flat)
"""
    + REACHED_LEVELS
    + """    level = ReduceSum <keepdims = 0> (reached_int, axis_1)
"""
)
PYRAMID_ROI_ALIGN_LEVEL = """
    place_{i} = Constant <value_int = {i}> ()
    on_{i} = Equal (level, place_{i})
    found_{i} = NonZero (on_{i})
    rows_{i} = Reshape (found_{i}, all_rows)
    rois_{i} = Gather (flat, rows_{i})
    image_{i} = Gather (image, rows_{i})
    map_{i} = Cast <to = 1> (p{level})
    pooled_{i} = RoiAlign <
        coordinate_transformation_mode = "half_pixel", mode = "avg", spatial_scale = {scale},
        output_height: int = @output_size, output_width: int = @output_size,
        sampling_ratio: int = @sampling_ratio
    > (map_{i}, rois_{i}, image_{i})
"""
PYRAMID_ROI_ALIGN_TAIL = """
    order = Concat <axis = 0> ({rows})
    by_level = Concat <axis = 0> ({pooled})
    count = Shape (order)
    count_scalar = Squeeze (count, axis_0)
    positions = Range (zero, count_scalar, one)
    blank = Expand (zero, count)
    place = ScatterElements <axis = 0> (blank, order, positions)
    in_order = Gather (by_level, place)
    pooled = CastLike (in_order, p2)
}}
"""


# The rows that were found in some image of the batch, at least one.
CUT_ROWS = """
<domain: "comask", opset_import: ["": 20]>
CutRows (values, found) => (rows)
{
    start = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    most = ReduceMax <keepdims = 1> (found)
    most_int = Cast <to = 7> (most)
    count = Max (most_int, one)
    rows = Slice (values, start, count, one)
}
"""
PAD_ROWS = """
<domain: "comask", opset_import: ["": 20]>
PadRows <detections> (rows) => (values)
{
    start = Constant <value_ints = [0]> ()
    axis = Constant <value_ints = [1]> ()
    detections = Constant <value_int: int = @detections> ()
    count = Shape <start = 1, end = 2> (rows)
    missing = Sub (detections, count)
    pads = Concat <axis = 0> (start, missing)
    values = Pad (rows, pads, , axis)
}
"""


def row_functions() -> list[onnx.FunctionProto]:
    """Returns `CutRows(values [B, D, …], found [B]) → [B, n, …]` and its inverse, `PadRows`."""
    return [onnx.parser.parse_function(text) for text in (CUT_ROWS, PAD_ROWS)]


def sorted_nms_function(
    count_type: onnx.TensorProto.DataType = onnx.TensorProto.FLOAT,
) -> onnx.FunctionProto:
    """Returns `SortedNms(boxes [G, M, 4], group_ids [G, M]) → keep [G, M]`.

    Args:
        count_type: the type in which suppressing boxes are counted, `FLOAT` or `FLOAT16`. In `FLOAT16` a
            sum of ones may be rounded, but never to 0, so the result is the same.
    """
    name = onnx.TensorProto.DataType.Name(count_type).lower()
    text = SORTED_NMS.replace("{count_type}", str(count_type)).replace("{count_name}", name)
    return onnx.parser.parse_function(text)


def pyramid_roi_align_function() -> onnx.FunctionProto:
    """Returns `PyramidRoiAlign(p2, p3, p4, p5, rois [B, N, 4]) → [R, C, S, S]`; pixels are aligned."""
    levels = range(len(STRIDES))
    text = PYRAMID_ROI_ALIGN_HEAD.format(factors=", ".join(f"{f:.9g}" for f in LEVEL_FACTORS))
    for i, stride in enumerate(STRIDES):
        text += PYRAMID_ROI_ALIGN_LEVEL.format(i=i, level=i + 2, scale=1 / stride)
    text += PYRAMID_ROI_ALIGN_TAIL.format(
        rows=", ".join(f"rows_{i}" for i in levels), pooled=", ".join(f"pooled_{i}" for i in levels)
    )
    return onnx.parser.parse_function(text)


def add_functions(model: onnx.ModelProto) -> None:
    """Appends the bodies of the custom ops that `model` uses."""
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    for function in (pyramid_roi_align_function(), sorted_nms_function(), *row_functions()):
        if function.name in used:
            model.functions.append(function)
    if used and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
