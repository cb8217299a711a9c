"""COCO's run-length encoding of masks (https://github.com/cocodataset/cocoapi, common/maskApi.c).

An image is walked over column by column. Runs are the lengths in pixels of 0, 1, 0, … in turn; the first
may be 0. Edges are the places, column · height + row, at which a run of other pixels begins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.signedinteger[Any]]


def rles_from_edges(
    edge_counts: Integers, edges: Integers, image_size: tuple[int, int]
) -> list[dict[str, Any]]:
    """COCO RLEs of N masks, equal to pycocotools' `encode`.

    Args:
        edge_counts: [N], edges of each mask.
        edges: those of all masks one after the other, each mask's in strictly rising order, in
            0..height·width - 1.
        image_size: (height, width) in pixels.

    Returns:
        N dicts of `size` ([height, width]) and `counts` (str).
    """
    height, width = image_size
    masks = np.arange(len(edge_counts))
    # each mask's edges between the start and the end of its image
    ends = np.cumsum(edge_counts + 2) - 1
    bounds = np.zeros(len(edges) + 2 * len(masks), np.int64)
    bounds[np.arange(len(edges)) + 2 * np.repeat(masks, edge_counts) + 1] = edges
    bounds[ends] = height * width
    runs = np.delete(np.diff(bounds), ends[:-1])
    strings = compress_runs(runs, edge_counts + 1)
    return [{"size": [height, width], "counts": string} for string in strings]


def compress_runs(runs: Integers, run_counts: Integers) -> list[str]:
    """COCO's strings of N masks' runs.

    From the fourth on, a number is the difference to the run two before. Each is written five bits a
    character, lowest first, as 48 + bits + (32 if more follow), in two's complement.

    Args:
        runs: those of all masks one after the other.
        run_counts: [N], at least 1 each.
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


def decompress_runs(counts: bytes) -> list[int]:
    """Runs from COCO's string; nonsense for a malformed one, but no error."""
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
