"""Large images by tiles: where tiles lie, and how what they found is joined."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise, permutations
from math import ceil
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_masks import ColourNetwork, bounds, detections

from comask.runtime.tiles import Region, joined
from comask.runtime.views import LEAST_TILE, MOST_OVERLAP, Views
from comask.structures import Detections

SCALE = 4.0  # then a border cuts what comes within a pixel of it


def joined_parts(
    size: tuple[int, int],
    parts: dict[Region, list[tuple[np.ndarray, float, int]]],
    whole: list[tuple[np.ndarray, float, int]] | None = None,
) -> Detections:
    """Joins (mask in the image, score, label) of tiles and of the whole image."""

    def found(region: Region, entries: list[tuple[np.ndarray, float, int]]) -> Detections:
        x1, y1, x2, y2 = region
        masks, scores, labels = zip(*entries, strict=True) if entries else ((), (), ())
        cut = [mask[y1:y2, x1:x2] for mask in masks]
        return detections(cut, (y2 - y1, x2 - x1), scores, labels)

    tiles = {region: found(region, entries) for region, entries in parts.items()}
    return joined(found((0, 0, size[1], size[0]), whole or []), tiles, SCALE)


def rectangle(size: tuple[int, int], x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    mask[y1:y2, x1:x2] = True
    return mask


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(LEAST_TILE, 200),
    st.floats(0.01, MOST_OVERLAP),
)
def test_tiles_cover_the_image_and_overlap(
    size: tuple[int, int], tile: int, overlap: float
) -> None:
    whole, *tiles = Views(tile=tile, tile_overlap=overlap).regions(size)
    assert whole == (0, 0, size[1], size[0])
    if max(size) <= tile:
        assert not tiles
        return
    covered = np.zeros(size, np.bool_)
    for x1, y1, x2, y2 in tiles:
        assert (x2 - x1, y2 - y1) == (min(tile, size[1]), min(tile, size[0]))
        covered[y1:y2, x1:x2] = True
    assert covered.all()
    assert len(set(tiles)) == len(tiles)
    for axis in (0, 1):
        sides = sorted({(region[axis], region[axis + 2]) for region in tiles})
        assert all(b[0] <= a[1] - max(1, ceil(tile * overlap)) for a, b in pairwise(sides))


@st.composite
def connected_masks(draw: st.DrawFn) -> np.ndarray:
    """A mask that is connected, also over corners, in an image of more than one tile of 32 pixels."""
    size = draw(st.integers(33, 90)), draw(st.integers(20, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coarse = rng.random((draw(st.integers(2, 30)), draw(st.integers(2, 30))))
    smooth = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_LINEAR)
    noisy = (smooth + 0.1 * rng.random(size)) > draw(st.floats(0.1, 0.8))
    _, components = cv2.connectedComponents(noisy.astype(np.uint8), connectivity=8)
    largest = np.bincount(components.ravel())[1:]
    return components == 1 + largest.argmax() if len(largest) else ~noisy


@given(connected_masks(), st.floats(0.01, 0.6), st.randoms(use_true_random=False))
def test_a_mask_that_is_cut_into_tiles_is_whole_again(
    mask: np.ndarray, overlap: float, random: Any
) -> None:
    regions = Views(tile=32, tile_overlap=overlap).regions(mask.shape)[1:]
    parts: dict[Region, list[Any]] = {}
    for region in regions:
        x1, y1, x2, y2 = region
        seen = mask[y1:y2, x1:x2].any()
        parts[region] = [(mask, random.uniform(0.1, 1), 2)] if seen else []
    found = joined_parts(mask.shape, parts)
    assert len(found) == 1
    np.testing.assert_array_equal(found.masks[0], mask)
    assert found.boxes_xyxy.tolist() == [bounds(mask)]
    best = max(score for entries in parts.values() for _, score, _ in entries)
    assert found.scores.tolist() == [np.float32(best)]
    assert found.labels.tolist() == [2]


def test_every_object_is_found_once_however_tiles_cut_it() -> None:
    """An object lies over four tiles, one over a seam, two in overlaps, one alone."""
    image = np.zeros((150, 200, 3), np.uint8)
    boxes = {
        1: (40, 40, 90, 100), 2: (120, 2, 140, 12), 3: (54, 110, 62, 118), 4: (10, 5, 20, 15),
        5: (150, 45, 160, 60), 6: (0, 120, 200, 125),
    }  # fmt: skip
    for number, (x1, y1, x2, y2) in boxes.items():
        image[y1:y2, x1:x2] = number, number % 3, 50 + number
    image[60:62, 60:70] = 0  # a hole
    network = ColourNetwork(64)
    found = network.look_at(image, tile=64, tile_overlap=0.2)
    tiles = Views(tile=64, tile_overlap=0.2).regions((150, 200))[1:]
    over = [
        sum(max(r[0], b[0]) < min(r[2], b[2]) and max(r[1], b[1]) < min(r[3], b[3]) for r in tiles)
        for b in boxes.values()
    ]
    assert over[0] >= 4
    assert min(over[1], over[2], over[4]) > 1 == over[3]
    assert found.scores.tolist() == [np.float32((50 + n) / 100) for n in (6, 5, 4, 3, 2, 1)]
    for mask, box, number in zip(found.masks, found.boxes_xyxy, (6, 5, 4, 3, 2, 1), strict=True):
        np.testing.assert_array_equal(mask, image[..., 0] == number)
        assert tuple(box.tolist()) == boxes[number]
    assert found.labels.tolist() == [n % 3 for n in (6, 5, 4, 3, 2, 1)]


def test_neighbours_of_one_class_stay_apart() -> None:
    """Two objects touch along a line in the overlap of two tiles, each of which cuts one of them."""
    size = (32, 52)
    left, right = rectangle(size, 2, 4, 26, 28), rectangle(size, 26, 6, 50, 30)
    one, other = (0, 0, 32, 32), (20, 0, 52, 32)
    entries = [(left, 0.9, 0), (right, 0.8, 0)]
    found = joined_parts(size, {one: entries, other: entries})
    np.testing.assert_array_equal(found.masks, [left, right])
    # also where masks are wrong by a few pixels
    wrong = {
        one: [(rectangle(size, 2, 4, 27, 28), 0.9, 0), (rectangle(size, 27, 6, 50, 30), 0.6, 0)],
        other: [(rectangle(size, 2, 4, 25, 28), 0.7, 0), (rectangle(size, 25, 6, 50, 30), 0.8, 0)],
    }
    assert joined_parts(size, wrong).scores.tolist() == np.float32([0.9, 0.8]).tolist()


def test_only_one_class_is_joined() -> None:
    size = (32, 52)
    mask = rectangle(size, 5, 5, 45, 20)
    parts = {(0, 0, 32, 32): [(mask, 0.9, 0)], (20, 0, 52, 32): [(mask, 0.8, 1)]}
    found = joined_parts(size, parts)
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(found.masks, [rectangle(size, 5, 5, 32, 20),
                                                rectangle(size, 20, 5, 45, 20)])  # fmt: skip


def test_of_duplicates_the_best_stays_as_it_is() -> None:
    """Two tiles see a whole object a little differently, and a third one does so at a border."""
    size = (32, 60)
    best, second = rectangle(size, 22, 8, 29, 20), rectangle(size, 23, 8, 30, 21)
    tiles = {
        (0, 0, 32, 32): [(second, 0.7, 0)], (14, 0, 46, 32): [(best, 0.6, 0)],
        (28, 0, 60, 32): [(rectangle(size, 28, 8, 31, 20), 0.8, 0)],
    }  # fmt: skip
    found = joined_parts(size, tiles)
    assert len(found) == 1
    np.testing.assert_array_equal(found.masks[0], second)  # the better one of those seen whole
    assert found.boxes_xyxy.tolist() == [bounds(second)]
    assert found.scores.tolist() == [np.float32(0.8)]


@pytest.mark.parametrize("scores", list(permutations((0.9, 0.6, 0.3))))
def test_a_middle_part_links_the_ends(scores: tuple[float, ...]) -> None:
    size = (32, 80)
    mask = rectangle(size, 4, 10, 76, 20)
    regions = (0, 0, 32, 32), (24, 0, 56, 32), (48, 0, 80, 32)
    parts = {r: [(mask, score, 0)] for r, score in zip(regions, scores, strict=True)}
    found = joined_parts(size, parts)
    np.testing.assert_array_equal(found.masks, [mask])
    assert found.scores.tolist() == [np.float32(0.9)]


def test_what_takes_two_objects_for_one_does_not_link_them() -> None:
    size = (32, 52)
    left, right = rectangle(size, 2, 8, 25, 20), rectangle(size, 27, 8, 50, 20)
    parts = {(0, 0, 32, 32): [(left, 0.9, 0)], (20, 0, 52, 32): [(right, 0.8, 0)]}
    blob = [(rectangle(size, 2, 8, 50, 20), 0.7, 0)]
    np.testing.assert_array_equal(joined_parts(size, parts, blob).masks, [left, right])


def test_an_object_larger_than_a_tile_comes_from_the_whole_image() -> None:
    """Tiles find little of it, or all of it with a finer mask."""
    size = (80, 80)
    regions = Views(tile=32).regions(size)[1:]
    coarse, fine = rectangle(size, 4, 4, 76, 76), rectangle(size, 5, 5, 75, 75)
    part = rectangle(size, 24, 24, 40, 40)
    few: dict[Region, list[Any]] = {r: [] for r in regions}
    found = joined_parts(size, few, [(coarse, 0.6, 0)])
    np.testing.assert_array_equal(found.masks, [coarse])
    few[regions[4]] = [(fine & part, 0.9, 0)]
    parts = {r: [(fine, 0.5, 0)] for r in regions}
    found = joined_parts(size, parts, [(coarse, 0.6, 0)])
    np.testing.assert_array_equal(found.masks, [fine])
    assert found.scores.tolist() == [np.float32(0.6)]
    parts = {r: [(fine, 0.5, 0)] if r == regions[4] else [] for r in regions}
    found = joined_parts(size, parts, [(coarse, 0.6, 0)])
    np.testing.assert_array_equal(found.masks, [coarse])


def test_both_arms_of_an_object_belong_to_it() -> None:
    """One tile sees two arms, which it takes for two objects; another one sees how they hang together."""
    size = (52, 32)
    arms = rectangle(size, 4, 4, 10, 40) | rectangle(size, 20, 4, 26, 40)
    whole = arms | rectangle(size, 4, 40, 26, 48)
    upper = [(rectangle(size, 4, 4, 10, 40), 0.8, 0), (rectangle(size, 20, 4, 26, 40), 0.7, 0)]
    found = joined_parts(size, {(0, 0, 32, 32): upper, (0, 20, 32, 52): [(whole, 0.9, 0)]})
    np.testing.assert_array_equal(found.masks, [whole])


def test_empty_images_and_empty_masks() -> None:
    size = (32, 52)
    tiles: dict[Region, list[Any]] = {(0, 0, 32, 32): [], (20, 0, 52, 32): []}
    assert len(joined_parts(size, tiles)) == 0
    tiles[0, 0, 32, 32] = [(np.zeros(size, np.bool_), 0.4, 0)]
    found = joined_parts(size, tiles)
    assert len(found) == 1
    assert not found.masks.any()


def test_memory_grows_with_the_objects_not_with_the_image() -> None:
    """A hundred megapixels with hundreds of objects; one dense mask alone would take 100 MB."""
    size, rng = (10_000, 10_000), np.random.default_rng(0)
    tiles: dict[Region, Detections] = {}
    for region in Views(tile=1024).regions(size)[1:]:
        corners = rng.uniform(0, 900, (4, 2)).astype(np.float32)
        tiles[region] = Detections(
            boxes_xyxy=np.concatenate([corners, corners + 100], axis=1),
            scores=rng.random(4, np.float32),
            labels=np.zeros(4, np.int64),
            mask_probs=np.ones((4, 28, 28), np.float32),
            image_size=(1024, 1024),
        )
    none = detections([], size)
    tracemalloc.start()
    found = joined(none, tiles, 1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) > 300
    assert peak < 20e6


def test_tiles_of_several_images_share_batches() -> None:
    network = ColourNetwork(64, max_batch=4)
    image = np.zeros((100, 120, 3), np.uint8)
    network.look_at(image, tile=64)
    count = len(Views(tile=64).regions((100, 120)))
    assert sum(batch[0] for batch in network.batches) == count == 7
    assert [batch[0] for batch in network.batches if batch[1:] == (64, 64)] == [4, 3]
