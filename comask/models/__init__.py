"""The network of the paper, one concept a file: start at `comask.models.comask`.

Backbone, neck, RPN (anchors → proposals), classifier (proposals → detections), box refinement (the
collaborative head: proposal → box and mask); around them the custom ops (RoIAlign, NMS), the code of
boxes, and what stays f32 in f16.
"""
