"""The mask kernels, built for the CPU, against numpy's pasting: no pixel and no edge differs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pycocotools import mask as coco
from strategies import FEW, seeds

from comask import masks
from comask.errors import KernelError
from comask.kernels import compile, launch, run
from comask.kernels.launch import MaskLaunches
from comask.masks import edges_by_kernel, edges_by_numpy, paste_masks, rles_from_mask_probs
from comask.preprocess import Placement
from comask.segmentation import decompress_runs, rles_from_edges
from comask.structures import detections_from_outputs

LENGTHS = st.integers(1, 70)
CELLS = st.sampled_from([1, 2, 7, 28, 56])
ODD = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, 0.0)


def instances(
    count: int, cells: int, size: tuple[int, int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Noise, discs and quarters (whose mixtures meet the threshold), over boxes of every kind."""
    rng = np.random.default_rng(seed)
    extent = np.array([size[1], size[0]])
    probs = rng.random((count, cells, cells), np.float32)
    y, x = np.mgrid[:cells, :cells] - (cells - 1) / 2
    probs[::3] = 1 / (1 + np.exp(np.hypot(x, y) - cells / 3))
    probs[1::3] = np.round(4 * probs[1::3]) / 4
    corner = rng.uniform(-0.6, 1.1, (count, 2)) * extent
    boxes = np.concatenate((corner, corner + rng.exponential(0.6, (count, 2)) * extent), 1)
    whole = rng.random(count) < 0.3
    boxes[whole] = boxes[whole].round()
    boxes[rng.random(count) < 0.2, 1] = -3
    boxes[rng.random(count) < 0.2, 3] = size[0] + 3
    odd = rng.random(boxes.shape) < 0.02
    boxes[odd] = rng.choice(ODD, odd.sum())
    return probs, boxes.astype(np.float32)


@FEW
@given(
    count=st.integers(0, 12), cells=CELLS, height=LENGTHS, width=LENGTHS,
    threshold=st.sampled_from([0.25, 0.3, 0.5, 0.75, 1.0]), seed=seeds,
)  # fmt: skip
@example(12, 28, 1, 1, 0.5, 0)
@example(12, 28, 1, 70, 0.5, 0)
@example(12, 7, 70, 1, 0.25, 0)
@example(9, 28, 3000, 400, 0.5, 0)  # more rows than the kernels tabulate
@example(9, 28, 3000, 9, 0.5, 0)
def test_edges_and_bitmaps_are_numpys(
    count: int, cells: int, height: int, width: int, threshold: float, seed: int
) -> None:
    size = (height, width)
    probs, boxes = instances(count, cells, size, seed)
    expected = paste_masks(probs, boxes, size, threshold)
    counts, edges = edges_by_kernel(probs, boxes, size, threshold)
    for ours, theirs in zip(
        (counts, edges), edges_by_numpy(probs, boxes, size, threshold), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    rles = [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in expected]
    found = rles_from_edges(counts, edges, size)
    assert found == [rle | {"counts": rle["counts"].decode()} for rle in rles]
    np.testing.assert_array_equal(bitmaps(probs, boxes, size, threshold), expected)


def bitmaps(
    probs: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float, threads: int = 1,
    found: int | None = None, scale: tuple[float, float] = (1.0, 1.0), strips: int | None = None,
    shift: int = 0,
) -> np.ndarray:  # fmt: skip
    """By the kernel, at `shift` bytes past an aligned address, between bytes that must not change."""
    count, cells = probs.shape[:2]
    length = count * size[0] * size[1]
    memory = np.full(length + 512, 7, np.uint8)
    begin = 192 + shift + -memory.ctypes.data % 64
    bytes_, outside = memory[begin : begin + length], np.ones(len(memory), bool)
    outside[begin : begin + length] = False
    number = np.array([count if found is None else found], np.int32)
    inputs = [probs.ctypes.data, boxes.ctypes.data, number.ctypes.data]
    launch = MaskLaunches(count, cells, size, threshold, scale).bitmaps()
    if strips is not None:
        integers = (*launch.integers[:-1], strips)
        launch = replace(launch, grid=count * strips, integers=integers)
    run.on_host(launch, inputs, bytes_.ctypes.data, threads)
    assert (memory[outside] == 7).all()
    return bytes_.reshape(count, *size)


@FEW
@given(
    count=st.integers(1, 6), cells=CELLS, height=st.integers(1, 150), width=st.integers(1, 150),
    strips=st.integers(1, 9), shift=st.integers(0, 63), threads=st.integers(1, 3), seed=seeds,
)  # fmt: skip
@example(6, 28, 3, 5, 9, 1, 1, 0)  # bitmaps smaller than a chunk; strips without one
@example(6, 28, 9, 2500, 1, 3, 1, 1)  # more columns than the kernel tabulates
@example(6, 28, 900, 40, 2, 3, 1, 2)  # more rows
def test_bitmaps_at_any_address_in_any_number_of_strips(
    count: int,
    cells: int,
    height: int,
    width: int,
    strips: int,
    shift: int,
    threads: int,
    seed: int,
) -> None:
    size = (height, width)
    probs, boxes = instances(count, cells, size, seed)
    boxes[0] = (-0.3 * width, -0.2 * height, 1.2 * width, 1.1 * height)
    boxes[-1] = boxes[-1, [0, 1, 0, 1]] + np.float32([0, 0, 0.7, 0.9])  # a pixel or none
    expected = paste_masks(probs, boxes, size, 0.5)
    ours = bitmaps(probs, boxes, size, 0.5, threads, strips=strips, shift=shift)
    np.testing.assert_array_equal(ours, expected)


def test_blocks_follow_the_number_and_the_size_of_the_masks() -> None:
    grids = {
        (masks, size): MaskLaunches(masks, 28, size, 0.5).bitmaps().grid
        for masks in (0, 1, 100, 5000)
        for size in ((9, 9), (1080, 1920))
    }
    assert [grids[0, size] for size in ((9, 9), (1080, 1920))] == [0, 0]
    assert [grids[masks, (9, 9)] for masks in (1, 100, 5000)] == [1, 100, 5000]
    assert [grids[masks, (1080, 1920)] for masks in (1, 100, 5000)] == [253, 1600, 5000]


@FEW
@given(
    count=st.integers(1, 9), found=st.integers(0, 9), cells=CELLS, height=LENGTHS, width=LENGTHS,
    scale=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)), seed=seeds,
)  # fmt: skip
def test_boxes_of_a_resized_image_and_rows_without_masks(
    count: int,
    found: int,
    cells: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    seed: int,
) -> None:
    """As `detections_from_outputs` cuts and divides, and `Detections` pastes."""
    size, found = (height, width), min(found, count)
    probs, boxes = instances(count, cells, size, seed)
    y_scale, x_scale = scale
    with np.errstate(over="ignore"):
        resized = (boxes * [x_scale, y_scale, x_scale, y_scale]).astype(np.float32)
    resized[~np.isfinite(resized)] = -1  # those are refused before anything is pasted
    rows = {
        "num_detections": [found],
        "scores": np.zeros((1, count)),
        "labels": np.zeros((1, count)),
    }
    arrays = {name: np.asarray(row) for name, row in rows.items()}
    arrays |= {"boxes": resized[None], "masks": probs[None]}
    placement = Placement((1, 1), size)
    with mock.patch.object(Placement, "scale", scale):
        (detections,) = detections_from_outputs(arrays, [placement])
    expected = np.zeros((count, *size), np.uint8)
    expected[:found] = detections.masks
    pasted = bitmaps(probs, resized, size, 0.5, found=found, scale=scale)
    np.testing.assert_array_equal(pasted, expected)

    number = np.array([found], np.int32)
    inputs = [probs.ctypes.data, resized.ctypes.data]
    by_column = np.full(count * (1 + width), -7, np.int32)
    launches = MaskLaunches(count, cells, size, 0.5, scale)
    run.on_host(launches.edge_counts(), [*inputs, number.ctypes.data], by_column.ctypes.data)
    assert not by_column[found:count].any()
    edges = np.full(by_column[:count].sum() + 1, -7, np.int32)
    launch = launches.edges(len(edges) - 1)
    run.on_host(launch, [*inputs, by_column.ctypes.data], edges.ctypes.data)
    assert rles_from_edges(by_column[:found], edges[:-1], size) == detections.to_rle()
    assert edges[-1] == -7


def test_masks_of_an_image_of_the_papers_size() -> None:
    size = (800, 1333)
    probs, boxes = instances(40, 28, size, 0)
    expected = paste_masks(probs, boxes, size, 0.5)
    assert (expected.reshape(40, -1).sum(axis=1) > 1000).sum() > 20
    np.testing.assert_array_equal(bitmaps(probs, boxes, size, 0.5, threads=3), expected)
    for ours, theirs in zip(
        edges_by_kernel(probs, boxes, size, 0.5),
        edges_by_numpy(probs, boxes, size, 0.5),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_edges_do_not_depend_on_threads_and_stay_within_the_capacity() -> None:
    size = (60, 50)
    probs, boxes = instances(30, 28, size, 1)
    counts, edges = edges_by_kernel(probs, boxes, size, 0.5)
    found = np.array([30], np.int32)
    inputs = [probs.ctypes.data, boxes.ctypes.data]
    for threads in (1, 3):
        by_column = np.full(30 * 51 + 1, -7, np.int32)
        launches = MaskLaunches(30, 28, size, 0.5)
        run.on_host(
            launches.edge_counts(), [*inputs, found.ctypes.data], by_column.ctypes.data, threads
        )
        np.testing.assert_array_equal(by_column[:30], counts)
        np.testing.assert_array_equal(by_column[30:-1].reshape(30, 50)[:, -1], counts)
        for capacity in (0, 1, len(edges) // 2, len(edges) + 9):
            found = np.full(len(edges) + 10, -7, np.int32)
            launch = launches.edges(capacity)
            run.on_host(launch, [*inputs, by_column.ctypes.data], found.ctypes.data, threads)
            written = min(capacity, len(edges))
            np.testing.assert_array_equal(found[:written], edges[:written])
            assert (found[written:] == -7).all()
        assert by_column[-1] == -7


@FEW
@given(height=LENGTHS, width=LENGTHS, density=st.floats(0, 1), seed=seeds)
def test_any_masks_edges_become_pycocotools_rle(
    height: int, width: int, density: float, seed: int
) -> None:
    dense = np.random.default_rng(seed).random((3, height, width)) < density
    dense[1] = np.repeat(dense[1, :, :1], width, axis=1)
    flat = dense.transpose(0, 2, 1).reshape(3, -1)
    edges = [np.flatnonzero(np.diff(mask.astype(int), prepend=0)) for mask in flat]
    counts = np.array([len(places) for places in edges])
    rles = rles_from_edges(counts, np.concatenate(edges), (height, width))
    for mask, rle in zip(dense, rles, strict=True):
        assert rle["counts"] == coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def test_long_runs_take_seven_characters() -> None:
    edges = np.array([2**30 - 1, 2**30, 2**30 + 3, 2**30 + 4, 2**31 - 2**21])
    (rle,) = rles_from_edges(np.array([5]), edges, (2**20, 2**11 - 1))
    assert rle == {"size": [2**20, 2**11 - 1], "counts": rle["counts"]}
    runs = np.diff(edges, prepend=0, append=2**20 * (2**11 - 1)).tolist()
    assert decompress_runs(rle["counts"].encode()).tolist() == runs
    theirs = coco.frPyObjects({"size": rle["size"], "counts": runs}, *rle["size"])
    assert rle["counts"] == theirs["counts"].decode()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CXX", "no-such-compiler")
    caches = (compile.host_library, masks._kernel_compiles)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_numpy_finds_the_edges_where_nothing_compiles(
    no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    probs, boxes = instances(5, 28, (30, 40), 2)
    with caplog.at_level(logging.INFO):
        rles = rles_from_mask_probs(probs, boxes, (30, 40), 0.5)
    assert "no C++ compiler" in caplog.text
    with pytest.raises(KernelError, match="no C"):
        edges_by_kernel(probs, boxes, (30, 40), 0.5)
    for mask, rle in zip(paste_masks(probs, boxes, (30, 40), 0.5), rles, strict=True):
        assert rle["counts"] == coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def test_masks_too_fine_for_the_kernel_are_pasted_all_the_same() -> None:
    probs, boxes = instances(9, 57, (30, 40), 3)
    expected = paste_masks(probs, boxes, (30, 40), 0.5)
    assert expected.any()
    for mask, rle in zip(expected, rles_from_mask_probs(probs, boxes, (30, 40), 0.5), strict=True):
        assert rle["counts"] == coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": 0}, "1 to 56"),
        ({"cells": 57}, "57 x 57 cells"),
        ({"image_size": (0, 4)}, "2\\^31 - 1 pixels"),
        ({"image_size": (2**16, 2**15)}, "2\\^31 - 1 pixels"),
        ({"masks": 2**28, "image_size": (4, 9)}, "as many columns"),
        ({"threshold": 0.0}, "expected a number above 0"),
        ({"threshold": float("nan")}, "expected a number above 0"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"masks": 3, "cells": 28, "image_size": (4, 4), "threshold": 0.5}
    MaskLaunches(**arguments)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=message):
        MaskLaunches(**(arguments | change))


def test_constants_agree() -> None:
    source = (compile.FOLDER / "paste_masks.cu").read_text()
    assert f"THREADS = {launch.MASK_THREADS};" in source
    assert f"MAX_CELLS = {launch.MAX_CELLS};" in source
