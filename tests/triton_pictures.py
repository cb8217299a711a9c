"""Images for tests of serving, on three canvases, and what a response must say of them."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comask.data.shapes import ShapesSource
from comask.runtime import Detections

IMAGES = [ShapesSource(num_images=4, seed=9).image(i) for i in range(4)]
IMAGES[2] = IMAGES[2][:40]


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def assert_tells(row: int, outputs: Mapping[str, np.ndarray], expected: Detections) -> None:
    """Compares one image of a response bit for bit, its padding included."""
    count = len(expected)
    assert outputs["num_detections"][row].tolist() == [count]
    assert outputs["error"][row].tolist() == [b""]
    assert tuple(outputs["image_size"][row]) == expected.image_size
    assert expected.category_ids is not None
    rows = {
        "boxes": expected.boxes_xyxy,
        "scores": expected.scores,
        "labels": expected.labels,
        "category_ids": [expected.category_ids[label] for label in expected.labels],
        "class_names": [expected.name(int(label)).encode() for label in expected.labels],
        "rle_counts": [rle["counts"].encode() for rle in expected.to_rle()],
    }
    for name, values in rows.items():
        np.testing.assert_array_equal(outputs[name][row, :count], values, err_msg=name)
        padding = outputs[name][row, count:]
        assert not padding.any(), name
