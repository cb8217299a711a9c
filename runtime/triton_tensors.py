"""The inputs and outputs of each model in a Triton server: names, types and shapes of the tensors.

`comask.export.triton` declares them in the repository; `comask.runtime.triton_model` reads and writes
them in the server.
"""

from __future__ import annotations

import numpy as np

from comask.bundle import Manifest
from comask.kernels.launch import LEVEL_STRIDES
from comask.runtime.backends.base import TensorSpec

IMAGE, PIXELS = "image", "pixels"
TEXT = np.dtype(object)  # UTF-8 as bytes, Triton's strings in numpy

# A request has one of these.
CLIENT_INPUTS = (
    TensorSpec(IMAGE, TEXT, (1,)),  # an encoded image: JPEG, PNG, …
    TensorSpec(PIXELS, np.dtype(np.uint8), ("height", "width", 3)),  # RGB
)


def client_outputs(manifest: Manifest) -> tuple[TensorSpec, ...]:
    """Returns the outputs that clients get, padded to D rows with zeros and empty strings.

    `boxes` are `xyxy` in pixels of the client's image. `rle_counts` and `image_size`, (height, width),
    are COCO's RLE. `error` says why an image has no detections; it is empty if all went well.
    """
    most = manifest.model.detections
    whole, small, real = (np.dtype(t) for t in (np.int64, np.int32, np.float32))
    return (
        TensorSpec("num_detections", small, (1,)),
        TensorSpec("boxes", real, (most, 4)),
        TensorSpec("scores", real, (most,)),
        TensorSpec("labels", whole, (most,)),
        TensorSpec("category_ids", whole, (most,)),
        TensorSpec("class_names", TEXT, (most,)),
        TensorSpec("rle_counts", TEXT, (most,)),
        TensorSpec("image_size", small, (2,)),
        TensorSpec("error", TEXT, (1,)),
    )


def stage_name(model: str, stage: str) -> str:
    """Returns the name of the server's model that is `stage1` or `stage2` of `model`."""
    return f"{model}_{stage}"


def graph_tensors(
    manifest: Manifest, stage: str, precision: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Returns inputs and outputs of a stage's graph in `precision`; the manifest has those of fp32."""

    def specs(side: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                entry["name"],
                np.dtype("float16" if half and entry["name"] in LEVEL_STRIDES else entry["dtype"]),
                tuple(entry["shape"][1:]),
            )
            for entry in manifest.graphs[stage][side]
        )

    half = precision != "fp32"
    return specs("inputs"), specs("outputs")
