"""The network of the paper, one concept per file; start at `comask.models.comask`.

The network consists of backbone, neck, RPN (anchors → proposals), classifier (proposals → detections) and
box refinement (the collaborative head: proposal → box and mask). The other files have the custom ops
(RoIAlign, NMS), operations on boxes, and the parts that stay f32 in an f16 network.
"""
