"""Instance masks between three forms: probabilities over a box, pixels of an image, COCO's RLE.

Coordinates are in pixels of the image, continuous: pixel x covers [x, x + 1), its centre is
x + 0.5. A box's mask is a grid of equal cells whose centres carry the probabilities. Pasting is
bilinear and zero outside the mask, as detectron2's `paste_masks_in_image` does it by grid_sample
(https://github.com/facebookresearch/detectron2, layers/mask_ops.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.errors import DataError

# A polygon's rasteriser takes memory in step with its outline, so a stray 1e12 would exhaust it.
_LARGEST_COORDINATE = 1e6


def paste_mask(
    probs: NDArray[np.float32],
    box_xyxy: Sequence[float],
    image_size: tuple[int, int],
    threshold: float,
) -> tuple[int, int, NDArray[np.bool_]]:
    """Paste one mask into the part of the image that it can touch.

    Args:
        probs: [m, m] f32, probabilities in 0..1 over the box.
        box_xyxy: the box's corners in pixels of the image, whole or broken, inside or outside it.
        image_size: (height, width) in pixels.
        threshold: above 0; a pixel belongs to the mask when its probability is at least this.

    Returns:
        (x0, y0, crop): crop is [h, w] bool, its top left pixel lies at (x0, y0) of the image, and
        no pixel outside it belongs to the mask. A box without area, with a coordinate that is not
        finite or outside the image gives a crop without pixels.
    """
    x1, y1, x2, y2 = map(float, box_xyxy)
    y0, rows = _axis_weights(y1, y2, probs.shape[0], image_size[0])
    x0, columns = _axis_weights(x1, x2, probs.shape[1], image_size[1])
    return x0, y0, rows @ probs @ columns.T >= threshold


def _axis_weights(
    start: float, stop: float, cells: int, size: int
) -> tuple[int, NDArray[np.float32]]:
    """Bilinear weights along one axis: the first pixel touched, and [pixels, cells] f32.

    Bilinear sampling is separable, so one such matrix an axis replaces a grid of sample points.
    """
    extent = stop - start
    if not 0 < extent < math.inf:  # false for NaN as well
        return 0, np.zeros((0, cells), np.float32)
    # Interpolation towards the zeros outside reaches half a cell beyond the box.
    skirt = extent / cells / 2
    first = math.ceil(min(max(start - skirt - 0.5, 0), size))
    last = math.floor(min(max(stop + skirt - 0.5, -1), size - 1))
    centres = (np.arange(first, last + 1) + 0.5 - start) / extent * cells - 0.5
    distances = np.abs(centres[:, None] - np.arange(cells))
    return first, np.maximum(1 - distances, 0).astype(np.float32)


def paste_masks(
    mask_probs: NDArray[np.float32],
    boxes: NDArray[np.float32],
    image_size: tuple[int, int],
    threshold: float,
) -> NDArray[np.bool_]:
    """`paste_mask` for N instances: [N, m, m] f32 and [N, 4] f32 to [N, H, W] bool."""
    masks = np.zeros((len(boxes), *image_size), np.bool_)
    for mask, probs, box in zip(masks, mask_probs, boxes, strict=True):
        x0, y0, crop = paste_mask(probs, box.tolist(), image_size, threshold)
        mask[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
    return masks


def rles_from_mask_probs(
    mask_probs: NDArray[np.float32],
    boxes: NDArray[np.float32],
    image_size: tuple[int, int],
    threshold: float,
) -> list[dict[str, Any]]:
    """COCO RLEs of what `paste_masks` makes of the same arguments, without whole images.

    Returns:
        N dicts of `size` ([height, width]) and `counts` (str), equal to pycocotools' `encode`.
    """
    from pycocotools import mask as coco

    height, width = image_size
    rles = []
    for probs, box in zip(mask_probs, boxes, strict=True):
        counts = _run_lengths(*paste_mask(probs, box.tolist(), image_size, threshold), image_size)
        rle = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        rles.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
    return rles


def _run_lengths(
    x0: int, y0: int, crop: NDArray[np.bool_], image_size: tuple[int, int]
) -> list[int]:
    """Lengths of the runs of 0, 1, 0, ... down the image's columns, all zero outside the crop."""
    height, width = image_size
    crop_height, crop_width = crop.shape
    # A blank pixel ends every run at its column's end, unless it goes on at the top of the next.
    stride = crop_height + (crop_height < height)
    flat = np.zeros(1 + crop_width * stride + 1, np.bool_)
    flat[1:-1].reshape(crop_width, stride)[:, :crop_height] = crop.T
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), stride)
    edges = (x0 + column) * height + y0 + row  # a start, an end, a start, ...
    counts: list[int] = np.diff(edges, prepend=0, append=height * width).tolist()
    # pycocotools writes a first run of 0 without pixels, but no last one.
    return counts[:-1] if counts[-1] == 0 else counts


def mask_from_segmentation(segmentation: object, height: int, width: int) -> NDArray[np.bool_]:
    """Rasterise a COCO annotation's `segmentation` (https://cocodataset.org/#format-data).

    Args:
        segmentation: polygons (a list of [x, y, x, y, ...] in pixels; those with fewer than
            3 points are ignored), or an RLE dict of `size` and `counts`, which is a list of run
            lengths or, compressed, a str or bytes.
        height: the image's, in pixels.
        width: the image's, in pixels.

    Returns:
        [height, width] bool, the polygons' union or the RLE's foreground.

    Raises:
        DataError: when the segmentation is none of these.
    """
    if isinstance(segmentation, dict):
        return _mask_from_rle(segmentation, height, width)
    if isinstance(segmentation, list):
        return _mask_from_polygons(segmentation, height, width)
    raise _malformed("a list of polygons or an RLE dict", segmentation)


def _mask_from_polygons(polygons: list[Any], height: int, width: int) -> NDArray[np.bool_]:
    from pycocotools import mask as coco

    drawable = []
    for polygon in polygons:
        try:
            points = np.asarray(polygon, np.float64)
        except (TypeError, ValueError):
            points = np.full(1, np.nan)
        if points.ndim != 1 or points.size % 2 or not (abs(points) <= _LARGEST_COORDINATE).all():
            raise _malformed("polygons that are lists [x, y, x, y, ...] of pixels", polygon)
        if points.size >= 6:
            drawable.append(points.tolist())
    if not drawable:
        return np.zeros((height, width), np.bool_)
    union = coco.decode(coco.merge(coco.frPyObjects(drawable, height, width)))
    return np.ascontiguousarray(union, np.bool_)


def _mask_from_rle(rle: dict[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise _malformed(f"an RLE of its image's size {[height, width]}", size)
    runs: Any = counts.encode() if isinstance(counts, str) else counts
    runs = _decompress(runs) if isinstance(runs, bytes) else runs
    # Not by pycocotools: it leaves the pixels that too short an RLE lacks uninitialised.
    valid = isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)
    if not valid or sum(runs) != height * width:
        raise _malformed(f"RLE counts that add up to {height} x {width} pixels", counts)
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(pixels.reshape(width, height).T)


def _decompress(counts: bytes) -> list[int]:
    """Run lengths from COCO's compressed string; nonsense for a malformed one, but no error.

    Each character holds 6 bits above 48: five of the number, lowest first, and whether more
    follow. From the fourth on, a number is the difference to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # negative: two's complement
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _malformed(expected: str, found: object) -> DataError:
    return DataError(f"segmentation: expected {expected}, got {found!r:.80}")
