"""Reads and writes the segmentations of COCO: polygons, and run lengths (RLE), plain or compressed.

https://cocodataset.org/#format-data describes the formats, common/maskApi.c of
https://github.com/cocodataset/cocoapi the RLE. It walks over an image column by column. Runs are the
lengths in pixels of the alternating values 0, 1, 0, …; the first run may be 0. Edges are the places,
column · height + row, at which the value changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.errors import DataError

Integers = NDArray[np.signedinteger[Any]]

LONGEST_NUMBER = 12  # characters, which hold 60 bits: more than any image needs

# The rasteriser's memory grows with a polygon's outline, so that a stray 1e12 would exhaust it.
_LARGEST_COORDINATE = 1e6


def rles_from_edges(
    edge_counts: Integers, edges: Integers, image_size: tuple[int, int]
) -> list[dict[str, Any]]:
    """Returns COCO RLEs of N masks, equal to those of pycocotools' `encode`.

    Args:
        edge_counts: [N], the number of edges of each mask.
        edges: the edges of one mask after the other, each mask's in strictly rising order, in
            0..height·width - 1.
        image_size: (height, width) in pixels.

    Returns:
        N dicts of `size` ([height, width]) and `counts` (str).
    """
    height, width = image_size
    masks = np.arange(len(edge_counts))
    # Each mask's edges are put between the start and the end of the image.
    ends = np.cumsum(edge_counts + 2) - 1
    bounds = np.zeros(len(edges) + 2 * len(masks), np.int64)
    bounds[np.arange(len(edges)) + 2 * np.repeat(masks, edge_counts) + 1] = edges
    bounds[ends] = height * width
    runs = np.delete(np.diff(bounds), ends[:-1])
    strings = compress_runs(runs, edge_counts + 1)
    return [{"size": [height, width], "counts": string} for string in strings]


def compress_runs(runs: Integers, run_counts: Integers) -> list[str]:
    """Returns COCO's compressed strings of N masks' runs.

    From the fourth run on, a string has the difference to the run two before it. Each number is written
    in two's complement, five bits per character, lowest bits first: 48 + bits + (32 if more follow).

    Args:
        runs: the runs of one mask after the other.
        run_counts: [N], the number of runs of each mask, at least 1.
    """
    if not len(run_counts):
        return []
    run_ends = np.cumsum(run_counts)
    rank = np.arange(len(runs)) - np.repeat(run_ends - run_counts, run_counts)
    numbers = runs.astype(np.int64)
    later = np.flatnonzero(rank > 2)
    numbers[later] -= runs[later - 2]
    magnitude = np.where(numbers < 0, ~numbers, numbers)
    lengths = np.ones(len(runs), np.int64)
    limit = 16
    while (longer := magnitude >= limit).any():
        lengths += longer
        limit *= 32
    ends = np.cumsum(lengths)
    text = np.empty(ends[-1], np.uint8)
    place, rest, left = ends - lengths, numbers, lengths
    while len(left):
        text[place] = 48 + (rest & 31) + 32 * (left > 1)
        more = left > 1
        place, rest, left = place[more] + 1, rest[more] >> 5, left[more] - 1
    string = text.tobytes().decode("ascii")
    stops = ends[run_ends - 1].tolist()
    return [string[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def decompress_runs(counts: bytes) -> Integers:
    """Returns the runs of COCO's string; if malformed, some are negative, or the sum is wrong."""
    characters = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(~characters & 32) + 1  # the place after each number's last character
    if not len(ends):
        return np.zeros(0, np.int64)
    starts = np.concatenate(([0], ends[:-1]))
    place = np.arange(ends[-1]) - np.repeat(starts, ends - starts)
    if place.max() >= LONGEST_NUMBER:
        return np.full(1, -1)
    values = np.add.reduceat((characters[: ends[-1]] & 31) << (5 * place), starts)
    negative = characters[ends - 1] & 16 != 0
    values -= np.where(negative, np.int64(1) << (5 * (ends - starts)), 0)
    # From the fourth on, a number is the difference to the run two before it.
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values


@dataclass(frozen=True, slots=True, eq=False)
class RunLengthMask:
    """A mask of a whole image whose memory grows with its outline, not with the image.

    Attributes:
        runs: [R] i64, the lengths of alternating 0, 1, 0, …, column by column; their sum is the number of
            pixels.
        size: (height, width) of the image in pixels.
    """

    runs: Integers
    size: tuple[int, int]

    @property
    def area(self) -> int:
        """The number of foreground pixels."""
        return int(self.runs[1::2].sum())

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """The foreground's (x1, y1, x2, y2), where x1 ≤ x < x2 in pixels; zeros if it is empty."""
        height, edges = self.size[0], np.cumsum(self.runs)
        last = len(edges) - len(edges) % 2
        starts, ends = edges[0:last:2], edges[1:last:2]
        starts, ends = starts[starts < ends], ends[starts < ends]
        if not len(starts):
            return 0, 0, 0, 0
        left, right = int(starts[0]) // height, int(ends[-1] - 1) // height + 1
        across = starts // height != (ends - 1) // height  # such a run reaches top and bottom
        if across.any():
            return left, 0, right, height
        top, bottom = (starts % height).min(), ((ends - 1) % height).max() + 1
        return left, int(top), right, int(bottom)

    def crop(self) -> tuple[int, int, NDArray[np.bool_]]:
        """Returns the mask within its `bounds`.

        Returns:
            (x, y, crop): `crop` is [h, w] bool, its top left pixel lies at (x, y) of the image.
        """
        bounds = self.bounds
        return *bounds[:2], self.part(*bounds)

    def part(self, x1: int, y1: int, x2: int, y2: int) -> NDArray[np.bool_]:
        """Returns [y2 - y1, x2 - x1] bool, the mask in a box of whole pixels within the image."""
        start, end = x1 * self.size[0], x2 * self.size[0]
        lengths = np.diff(np.cumsum(self.runs).clip(start, end), prepend=start)
        columns = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(
            x2 - x1, self.size[0]
        )
        return np.ascontiguousarray(columns[:, y1:y2].T)

    def bitmap(self) -> NDArray[np.bool_]:
        """Returns the mask of the whole image as [height, width] bool."""
        height, width = self.size
        return self.part(0, 0, width, height)

    def to_coco(self) -> dict[str, Any]:
        """Returns COCO's compressed RLE: `size` and `counts` (str)."""
        (counts,) = compress_runs(self.runs, np.array([len(self.runs)]))
        return {"size": list(self.size), "counts": counts}


def read_segmentation(segmentation: object, height: int, width: int) -> RunLengthMask:
    """Rasterises one object's segmentation.

    Args:
        segmentation: polygons, or an RLE. Polygons are a list of [x, y, x, y, ...] in pixels; those with
            fewer than 3 points are ignored. An RLE is a dict of `size` and `counts`; the counts are a
            list of run lengths or, compressed, a str or bytes.
        height: the image's height in pixels.
        width: the image's width in pixels.

    Returns:
        The polygons' union or the RLE's foreground.

    Raises:
        DataError: when the segmentation has another form.
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
        except (TypeError, ValueError, OverflowError):  # OverflowError: an integer beyond f64
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
    # pycocotools is not used here, since it leaves pixels uninitialised if an RLE is too short.
    runs = _runs(counts.encode(errors="replace") if isinstance(counts, str) else counts)
    pixels = height * width
    if runs is None or not ((runs >= 0) & (runs <= pixels)).all() or runs.sum() != pixels:
        raise _malformed(f"RLE counts that add up to {height} x {width} pixels", counts)
    return RunLengthMask(runs, (height, width))


def _runs(counts: Any) -> Any:
    """Returns [R] i64, or None if `counts` are not run lengths."""
    if isinstance(counts, bytes):
        return decompress_runs(counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) for run in counts):
        return None
    # Larger runs exceed any image, and their sum might exceed i64.
    return np.array(counts, np.int64) if all(0 <= run < 2**40 for run in counts) else None


def _malformed(expected: str, got: object) -> DataError:
    return DataError(f"segmentation: expected {expected}, got {got!r:.80}")
