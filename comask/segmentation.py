"""Reads the `segmentation` of COCO annotations and results (https://cocodataset.org/#format-data)."""

from __future__ import annotations

from typing import Any

import numpy as np

from comask.errors import DataError
from comask.rle import RunLengthMask, decompress_runs

# A polygon's rasteriser takes memory in step with its outline, so a stray 1e12 would exhaust it.
_LARGEST_COORDINATE = 1e6


def read_segmentation(segmentation: object, height: int, width: int) -> RunLengthMask:
    """Rasterises one object's segmentation.

    Args:
        segmentation: polygons (a list of [x, y, x, y, ...] in pixels; those with fewer than
            3 points are ignored), or an RLE dict of `size` and `counts`, which is a list of run
            lengths or, compressed, a str or bytes.
        height: the image's, in pixels.
        width: the image's, in pixels.

    Returns:
        The polygons' union or the RLE's foreground.

    Raises:
        DataError: when the segmentation is none of these.
    """
    if isinstance(segmentation, dict):
        return _from_rle(segmentation, height, width)
    if isinstance(segmentation, list):
        return _from_polygons(segmentation, height, width)
    raise _malformed("a list of polygons or an RLE dict", segmentation)


def _from_polygons(polygons: list[Any], height: int, width: int) -> RunLengthMask:
    from pycocotools import mask as coco

    drawable = []
    for polygon in polygons:
        try:
            points = np.asarray(polygon, np.float64)
        except (TypeError, ValueError, OverflowError):  # of integers beyond f64
            points = np.full(1, np.nan)
        if points.ndim != 1 or points.size % 2 or not (abs(points) <= _LARGEST_COORDINATE).all():
            raise _malformed("polygons that are lists [x, y, x, y, ...] of pixels", polygon)
        if points.size >= 6:
            drawable.append(points.tolist())
    if not drawable:
        return RunLengthMask(np.array([height * width]), (height, width))
    union = coco.merge(coco.frPyObjects(drawable, height, width))
    return RunLengthMask(decompress_runs(union["counts"]), (height, width))


def _from_rle(rle: dict[str, Any], height: int, width: int) -> RunLengthMask:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise _malformed(f"an RLE of its image's size {[height, width]}", size)
    # Not by pycocotools: it leaves the pixels that too short an RLE lacks uninitialised.
    runs = _runs(counts.encode(errors="replace") if isinstance(counts, str) else counts)
    pixels = height * width
    if runs is None or not ((runs >= 0) & (runs <= pixels)).all() or runs.sum() != pixels:
        raise _malformed(f"RLE counts that add up to {height} x {width} pixels", counts)
    return RunLengthMask(runs, (height, width))


def _runs(counts: Any) -> Any:
    """[R] i64; None where `counts` are not run lengths."""
    if isinstance(counts, bytes):
        return decompress_runs(counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) for run in counts):
        return None
    # beyond any image, and its sum beyond i64
    return np.array(counts, np.int64) if all(0 <= run < 2**40 for run in counts) else None


def _malformed(expected: str, found: object) -> DataError:
    return DataError(f"segmentation: expected {expected}, got {found!r:.80}")
