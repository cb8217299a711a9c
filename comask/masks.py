"""Converts instance masks from probabilities over a box to pixels of an image or to COCO's RLE.

Coordinates are continuous, in pixels of the image: pixel x covers [x, x + 1), its centre is x + 0.5. A
box's mask is a grid of equal cells whose centres have the probabilities. Pasting interpolates bilinearly
and takes zeros outside the mask, as detectron2's `paste_masks_in_image` does with grid_sample
(https://github.com/facebookresearch/detectron2, layers/mask_ops.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.errors import KernelUnavailableError
from comask.kernels import compile, run
from comask.kernels.launch import MASKS, MAX_CELLS, MaskLaunches
from comask.segmentation import Integers, RunLengthMask, rles_from_edges

logger = logging.getLogger(__name__)


def paste_mask(
    probs: NDArray[np.float32],
    box_xyxy: Sequence[float],
    image_size: tuple[int, int],
    threshold: float,
) -> tuple[int, int, NDArray[np.bool_]]:
    """Pastes one mask into the part of the image that it can touch.

    Args:
        probs: see `paste_probs`.
        box_xyxy: see `paste_probs`.
        image_size: see `paste_probs`.
        threshold: above 0; a pixel belongs to the mask when its probability is at least this.

    Returns:
        (x0, y0, crop): `crop` is [h, w] bool, its top left pixel lies at (x0, y0) of the image, and no
        pixel outside it belongs to the mask.
    """
    x0, y0, values = paste_probs(probs, box_xyxy, image_size)
    return x0, y0, values >= np.float32(threshold)


def paste_probs(
    probs: NDArray[np.float32], box_xyxy: Sequence[float], image_size: tuple[int, int]
) -> tuple[int, int, NDArray[np.float32]]:
    """Pastes one mask's probabilities into the part of the image that they can touch.

    Interpolation is along x, then along y, in float32, with weights computed in float64. The kernel
    `paste_masks.cu` does the same, so that both round alike and no pixel differs.

    Args:
        probs: [rows, columns] f32, probabilities in 0..1 over the box.
        box_xyxy: the box's corners in pixels of the image; they may be fractional or outside the image.
        image_size: (height, width) in pixels.

    Returns:
        (x0, y0, values): `values` is [h, w] f32, its top left pixel lies at (x0, y0) of the image, and
        all pixels outside it are 0. It is empty if the box has no area, lies outside the image, or has
        a coordinate that is not finite.
    """
    x1, y1, x2, y2 = map(float, box_xyxy)
    cells = np.zeros((probs.shape[0] + 2, probs.shape[1] + 2), np.float32)
    cells[1:-1, 1:-1] = probs
    x0, left, x_weight = _places(x1, x2, probs.shape[1], image_size[1])
    y0, upper, y_weight = _places(y1, y2, probs.shape[0], image_size[0])
    rows = cells[:, left] + (cells[:, left + 1] - cells[:, left]) * x_weight
    values = np.diff(rows, axis=0)[upper]
    values *= y_weight[:, None]
    values += rows[upper]
    return x0, y0, values


def _places(
    start: float, stop: float, cells: int, size: int
) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
    """Returns the first pixel within half a cell of a box, and for each pixel the cells around it.

    Returns:
        (first, low [pixels], weight [pixels]): each pixel lies between the cells low and low + 1, of
        which the latter has the weight. Cell 0 is a cell of zeros before the mask's first one.
    """
    extent = stop - start
    if not 0 < extent < math.inf:  # False for NaN as well
        return 0, np.zeros(0, np.int64), np.zeros(0, np.float32)
    positions = (np.arange(size) + 0.5 - start) * (cells / extent) - 0.5
    first, end = np.searchsorted(positions, (-1, cells)).tolist()
    low = np.floor(positions[first:end])
    return first, low.astype(np.int64) + 1, (positions[first:end] - low).astype(np.float32)


def paste_masks(
    mask_probs: NDArray[np.float32],
    boxes: NDArray[np.float32],
    image_size: tuple[int, int],
    threshold: float,
) -> NDArray[np.bool_]:
    """Pastes N masks, [N, M, M] f32 over boxes [N, 4] f32, into [N, height, width] bool."""
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
    """Returns the COCO RLEs of the masks that `paste_masks` gives, without pasting whole images.

    The kernel `paste_masks.cu` finds the edges if a C++ compiler is installed; otherwise, numpy does.

    Returns:
        N dicts of `size` ([height, width]) and `counts` (str), equal to pycocotools' `encode`.
    """
    by_kernel = mask_probs.shape[1] <= MAX_CELLS and _kernel_compiles()
    find = edges_by_kernel if by_kernel else edges_by_numpy
    edge_counts, edges = find(mask_probs, boxes, image_size, threshold)
    return rles_from_edges(edge_counts, edges, image_size)


@cache
def _kernel_compiles() -> bool:
    try:
        compile.host_library(MASKS)
    except KernelUnavailableError as error:
        logger.info("numpy finds the edges of masks: %s", error)
        return False
    return True


def edges_by_kernel(
    mask_probs: NDArray[np.float32],
    boxes: NDArray[np.float32],
    image_size: tuple[int, int],
    threshold: float,
) -> tuple[Integers, Integers]:
    """Finds the edges of the masks that `paste_masks` gives, as (edge_counts, edges).

    `rles_from_edges` takes both.

    Raises:
        KernelError: when no C++ compiler is installed, or the masks have more than `MAX_CELLS` cells per
            side.
    """
    probs, corners = (np.ascontiguousarray(x, np.float32) for x in (mask_probs, boxes))
    found = np.array([len(probs)], np.int32)
    addresses = [probs.ctypes.data, corners.ctypes.data]
    launches = MaskLaunches(len(probs), probs.shape[1], image_size, threshold)
    counts = np.empty(len(probs) * (1 + image_size[1]), np.int32)
    run.on_host(launches.edge_counts(), [*addresses, found.ctypes.data], counts.ctypes.data)
    edge_counts = counts[: len(probs)]
    edges = np.empty(edge_counts.sum(), np.int32)
    run.on_host(launches.edges(len(edges)), [*addresses, counts.ctypes.data], edges.ctypes.data)
    return edge_counts, edges


def edges_by_numpy(
    mask_probs: NDArray[np.float32],
    boxes: NDArray[np.float32],
    image_size: tuple[int, int],
    threshold: float,
) -> tuple[Integers, Integers]:
    """Finds the same edges as `edges_by_kernel` without a compiler."""
    edges = [
        _edges_of_crop(*paste_mask(probs, box.tolist(), image_size, threshold), image_size)
        for probs, box in zip(mask_probs, boxes, strict=True)
    ]
    counts = np.array([len(places) for places in edges], np.int64)
    return counts, np.concatenate([np.zeros(0, np.int64), *edges])


def run_length_mask(
    x0: int, y0: int, crop: NDArray[np.bool_], image_size: tuple[int, int]
) -> RunLengthMask:
    """Returns the mask of a whole image with `crop` at (x0, y0), and empty elsewhere."""
    edges = _edges_of_crop(x0, y0, crop, image_size)
    return RunLengthMask(np.diff(edges, prepend=0, append=math.prod(image_size)), image_size)


def resized_mask(mask: RunLengthMask, image_size: tuple[int, int]) -> RunLengthMask:
    """Returns a mask in the image when it is resized to (height, width), by the nearest pixel centres."""
    x, y, crop = mask.crop()
    (y0, rows), (x0, columns) = (
        _nearest(size, old, first, count)
        for size, old, first, count in zip(image_size, mask.size, (y, x), crop.shape, strict=True)
    )
    return run_length_mask(x0, y0, crop[rows[:, None], columns], image_size)


def _nearest(size: int, old: int, first: int, count: int) -> tuple[int, NDArray[np.int64]]:
    """Returns the first pixel of a resized side whose nearest old one is in a crop, and all such ones.

    Args:
        size: length of the resized side.
        old: its length before.
        first: the crop's first pixel.
        count: the crop's length.

    Returns:
        (start, places): `places` are indices into the crop, of the pixels from `start` on.
    """
    nearest = (2 * np.arange(size) + 1) * old // (2 * size)
    start, end = np.searchsorted(nearest, (first, first + count)).tolist()
    return start, nearest[start:end] - first


def _edges_of_crop(
    x0: int, y0: int, crop: NDArray[np.bool_], image_size: tuple[int, int]
) -> NDArray[np.int64]:
    height, width = image_size
    crop_height, crop_width = crop.shape
    # A blank pixel after each column ends its last run, unless runs continue at the next column's top.
    stride = crop_height + (crop_height < height)
    flat = np.zeros(1 + crop_width * stride + 1, np.bool_)
    flat[1:-1].reshape(crop_width, stride)[:, :crop_height] = crop.T
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), max(stride, 1))
    edges = (x0 + column) * height + y0 + row
    return edges[edges < height * width]  # the end of the image is not an edge
