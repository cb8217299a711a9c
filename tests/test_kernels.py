"""The kernels, built for the CPU, against torchvision."""

from __future__ import annotations

import ctypes
import math
import mmap
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FEW, random_boxes, seeds
from torch import Tensor
from torchvision.ops.poolers import LevelMapper

from comask.errors import KernelError, KernelUnavailableError
from comask.kernels import compile, run
from comask.kernels.launch import (
    MAX_BOXES,
    float32_below,
    nms_keep_launch,
    nms_launch,
    nms_overlaps_launch,
    roi_align_launch,
)

STRIDES = (4, 8, 16, 32)
NAN, INF = math.nan, math.inf


def torchvisions(maps: list[Tensor], rows: Tensor, size: int, ratio: int, canonical: int) -> Tensor:
    """[R, C, S, S] f32 of rows [R, 5]; what is inside out has no area and is pooled from P2."""
    sound = torch.cat((rows[:, 1:3], rows[:, 1:].view(-1, 2, 2).amax(dim=1)), dim=1)
    levels = LevelMapper(2, 5, canonical_scale=canonical)([sound])
    pooled = torch.empty(len(rows), maps[0].shape[1], size, size)
    for k, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        pooled[levels == k] = torchvision.ops.roi_align(
            features.float(), rows[levels == k], size, 1 / stride, ratio, aligned=True
        )
    return pooled


def guarded(shape: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> Tensor:
    """A tensor of NaN between NaNs: what is read or written beside it shows."""
    count = math.prod(shape)
    return torch.full((count + 128,), NAN, dtype=dtype)[64 + shift :][:count].view(shape)


def kernels(
    maps: list[Tensor], rois: Tensor, size: int, ratio: int = 2, canonical: float = 224.0, *,
    rois_per_image: int = 0, half: bool = False, channels_last: bool = False, pad: int = 0,
    shift: int = 0, threads: int = 1,
) -> Tensor:  # fmt: skip
    """[R, C, S, S] of maps [B, C, H, W], which are laid out as asked for."""
    dtype = torch.float16 if half else torch.float32
    channels = maps[0].shape[1]

    def shape(rows: int, height: int, width: int) -> tuple[int, ...]:
        if channels_last:
            return rows, height, width, channels + pad
        return rows, channels, height, width

    inputs = []
    for features in maps:
        laid = guarded(shape(len(features), *features.shape[2:]), dtype, shift)
        view = laid[..., :channels].permute(0, 3, 1, 2) if channels_last else laid
        view.copy_(features)
        inputs.append(laid)
    launch = roi_align_launch(
        [features.shape for features in maps], len(rois), rois_per_image, size, ratio, canonical,
        half=half, channels_last=channels_last, channel_stride=channels + pad,
    )  # fmt: skip
    pooled = guarded(shape(len(rois), size, size), dtype, shift)
    around = pooled.untyped_storage()
    run.on_host(launch, [x.data_ptr() for x in (*inputs, rois)], pooled.data_ptr(), threads)
    everything = torch.empty(0, dtype=dtype).set_(around)
    assert everything[: 64 + shift].isnan().all()
    assert everything[64 + shift + pooled.numel() :].isnan().all()
    if not channels_last:
        return pooled
    assert not pooled[..., channels:].any()
    return pooled[..., :channels].permute(0, 3, 1, 2)


def pyramid(batch: int, channels: int, height: int, width: int, seed: int) -> list[Tensor]:
    """Maps of an image of that size in units of 32 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, height * 32 // s, width * 32 // s, generator=generator)
        for s in STRIDES
    ]


def some_rois(count: int, batch: int, size: float, canonical: float, seed: int) -> Tensor:
    """Rows [R, 5]: of all levels, across borders, points, lines, inside out."""
    generator = torch.Generator().manual_seed(seed)
    side = canonical * 2 ** (torch.rand(count, 1, generator=generator) * 5 - 3)
    boxes = random_boxes(generator, count, size, 1) - side / 3
    boxes[:, 2:] += side * torch.rand(count, 2, generator=generator)
    kind = torch.randint(0, 12, (count,), generator=generator)
    boxes[kind == 0, 2:] = boxes[kind == 0, :2]
    boxes[kind == 1, 2] = boxes[kind == 1, 0]
    boxes[kind == 2] = boxes[kind == 2][:, [2, 3, 0, 1]]
    boxes[kind == 3] = boxes[kind == 3].round()
    image = torch.randint(0, batch, (count, 1), generator=generator)
    return torch.cat((image, boxes), dim=1)


@FEW
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 20), height=st.integers(1, 6),
    width=st.integers(1, 6), count=st.integers(0, 12), size=st.integers(1, 15),
    ratio=st.integers(1, 4), canonical=st.sampled_from([28, 56, 224]), half=st.booleans(),
    channels_last=st.booleans(), pad=st.integers(0, 9), shift=st.integers(0, 3), seed=seeds,
)  # fmt: skip
@example(2, 256, 3, 5, 8, 7, 2, 56, False, True, 0, 0, 0)  # in vectors
@example(2, 260, 3, 5, 8, 14, 2, 56, True, True, 4, 0, 0)  # C not a multiple of 8, padded
@example(2, 13, 3, 5, 8, 7, 3, 56, True, True, 3, 0, 0)  # vectors, another ratio
@example(1, 150, 2, 2, 5, 8, 16, 56, True, False, 0, 0, 0)  # 128 samples an axis
def test_roi_align_is_torchvisions(
    batch: int, channels: int, height: int, width: int, count: int, size: int, ratio: int,
    canonical: int, half: bool, channels_last: bool, pad: int, shift: int, seed: int,
) -> None:  # fmt: skip
    maps = pyramid(batch, channels, height, width, seed)
    if half:
        maps = [features.half().float() for features in maps]
    rows = some_rois(count, batch, 32 * max(height, width), canonical, seed)
    layout = {"half": half, "channels_last": channels_last, "pad": pad * channels_last}
    ours = kernels(maps, rows, size, ratio, canonical, shift=shift, **layout)  # type: ignore[arg-type]
    theirs = torchvisions(maps, rows, size, ratio, canonical)
    if half:
        torch.testing.assert_close(ours, theirs.half(), rtol=1e-3, atol=1e-5)  # one unit at most
    else:
        assert (ours - theirs).abs().max() <= 1e-5 if count else ours.numel() == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_rois_of_all_levels_in_rows_of_an_image(half: bool, channels_last: bool) -> None:
    maps = [features.half().float() for features in pyramid(3, 40, 12, 16, 0)]
    rows = some_rois(120, 1, 350, 224, 1)
    rows[:, 0] = torch.arange(3).repeat_interleave(40)
    assert LevelMapper(2, 5)([rows[:, 1:]]).unique().tolist() == [0, 1, 2, 3]
    theirs = torchvisions(maps, rows, 7, 2, 224)
    assert theirs.flatten(1).any(dim=1).sum() > 100
    layout = {"half": half, "channels_last": channels_last}
    results = [
        kernels(maps, rows[:, 1:].contiguous(), 7, rois_per_image=40, **layout),  # type: ignore[arg-type]
        kernels(maps, rows, 7, threads=1, **layout),  # type: ignore[arg-type]
        kernels(maps, rows, 7, threads=3, **layout),  # type: ignore[arg-type]
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])
    error = (results[0].float() - theirs).abs().max()
    assert error <= (2e-3 if half else 1e-5)  # half of f16's last place below 4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38, -3e38])
@pytest.mark.parametrize("places", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_boxes_of_nan_and_infinity_give_zeros(
    places: tuple[int, ...], value: float, channels_last: bool
) -> None:
    rows = torch.tensor([[0.0, 20, 30, 90, 80]]).repeat(2, 1)
    rows[0, [place + 1 for place in places]] = value
    pooled = kernels(pyramid(1, 8, 4, 4, 0), rows, 7, channels_last=channels_last)
    assert not pooled[0].any()
    assert pooled[1].all()


def test_a_roi_of_no_image_gives_zeros() -> None:
    images = torch.tensor([0.0, 1, 2, -1, 1e30, -INF, INF, NAN])
    rows = torch.cat((images[:, None], torch.tensor([[20.0, 30, 90, 80]]).repeat(8, 1)), dim=1)
    pooled = kernels(pyramid(2, 4, 4, 4, 0), rows, 7)
    assert pooled.flatten(1).any(dim=1).tolist() == [True, True] + [False] * 6


def test_a_sample_at_the_border_counts_and_one_beyond_it_does_not() -> None:
    maps = [torch.ones_like(features) for features in pyramid(1, 1, 4, 4, 0)]
    edge = -1 * 4 + 2  # lies at -1 on P2, where a RoI of no size has all its samples
    far = 32 * 4 + 2  # at the map's length
    rows = torch.tensor([[0.0, x, 50, x, 50] for x in (edge, edge - 1e-4, far, far + 1e-4)])
    pooled = kernels(maps, rows, 1, 1)
    assert pooled.flatten().tolist() == [1, 0, 1, 0]
    assert torch.equal(pooled, torchvisions(maps, rows, 1, 1, 224))


def test_offsets_past_two_to_the_31() -> None:
    height, width, channels = 2**13, 2**14, 17  # of f16: 4.25 GiB, of which two rows are touched
    size = height * width * channels * 2
    no_reserve = 0x4000  # Linux's MAP_NORESERVE; its name came with Python 3.13
    large = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    values = np.frombuffer(large, np.float16).reshape(channels, height, width)
    values[-1, -1, -2:] = 3
    small = np.zeros((channels, 1, 1), np.float16)
    launch = roi_align_launch(
        [(1, *values.shape)] + [(1, channels, 1, 1)] * 3, 1, 1, 1, 1, 224.0,
        half=True, channels_last=False,
    )  # fmt: skip
    x, y = width * 4 - 4, height * 4 - 2  # between the last two pixels of the last row
    roi, pooled = np.array([x, y, x, y], np.float32), np.zeros(channels, np.float16)
    inputs = [values, small, small, small, roi]
    run.on_host(launch, [array.ctypes.data for array in inputs], pooled.ctypes.data)
    assert pooled.tolist() == [0] * 16 + [3]


HALVES = """
#include "portable.h"
extern "C" void widen(const unsigned short *halves, float *floats, int count) {
    for (int i = 0; i < count; ++i) floats[i] = to_float(halves[i]);
}
extern "C" void narrow(const float *floats, unsigned short *halves, int count) {
    for (int i = 0; i < count; ++i) store(halves + i, floats[i]);
}
"""


def test_halves_convert_as_ieee_says(tmp_path: Path) -> None:
    (tmp_path / "halves.cu").write_text(HALVES)
    command = ["g++", *compile.HOST_OPTIONS, f"-I{compile.FOLDER}", "halves.cu", "-o", "halves.so"]
    subprocess.run(command, check=True, cwd=tmp_path)
    library = ctypes.CDLL(str(tmp_path / "halves.so"))

    def converted(name: str, values: np.ndarray, result: type) -> np.ndarray:
        out = np.empty(len(values), result)
        arguments = [ctypes.c_void_p(array.ctypes.data) for array in (values, out)]
        getattr(library, name)(*arguments, len(values))
        return out

    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    floats = converted("widen", halves, np.float32)
    np.testing.assert_array_equal(floats, halves.astype(np.float32))
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    finite = floats[np.isfinite(floats)].astype(np.float64)
    ties = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
    near = np.concatenate([np.nextafter(ties, np.float32(s)) for s in (-np.inf, np.inf)])
    for values in (floats, bits, ties, near, np.float32([65519.9, 65520, -65520, 1e-8])):
        with np.errstate(over="ignore", invalid="ignore"):
            expected = values.astype(np.float16)
        np.testing.assert_array_equal(converted("narrow", values, np.float16), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_size": 65}, "their? product at most 128"),
        ({"sampling_ratio": 0}, "must be at least 1"),
        ({"num_rois": 5}, "expected 6, 3 for each of 2 images"),
        ({"channel_stride": 4}, "channel_stride=4 for 8 channels"),
        ({"channel_stride": 16}, "unless the maps are channels-last"),
        ({"map_shapes": [(2, 8, 4, 4)] * 3}, r"four maps \(B, C, H, W\)"),
        ({"map_shapes": [(2, 8, 4, 4)] * 3 + [(2, 9, 4, 4)]}, "with the same B and C"),
        ({"map_shapes": [(2, 8, 4, 4)] * 3 + [(2, 8, 0, 4)]}, "an empty map"),
        ({"num_rois": 2**30, "rois_per_image": 0, "map_shapes": [(1, 256, 1, 1)] * 4}, "blocks"),
    ],
)
def test_roi_align_refuses_what_it_cannot_do(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "map_shapes": [(2, 8, 4, 4)] * 4, "num_rois": 6, "rois_per_image": 3, "output_size": 7,
        "sampling_ratio": 2, "canonical_size": 224.0, "half": False, "channels_last": False,
    }  # fmt: skip
    roi_align_launch(**arguments)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=message):
        roi_align_launch(**(arguments | change))  # type: ignore[arg-type]


def keeps(boxes: np.ndarray, groups: np.ndarray, threshold: float, threads: int = 1) -> np.ndarray:
    """`SortedNms` of [G, M, 4] and [G, M], in one launch and in two, which give the same."""
    boxes, groups = boxes.astype(np.float32), groups.astype(np.int32)
    inputs, (rows, count) = [boxes.ctypes.data, groups.ctypes.data], groups.shape
    keep = np.full((2, groups.size + 64), 7, np.uint8)  # with some to spare
    run.on_host(nms_launch(rows, count, threshold), inputs, keep[0].ctypes.data, threads)
    words = np.full(rows * -(-count // 32) * count + 64, -7, np.int32)
    overlaps = nms_overlaps_launch(rows, count, threshold)
    run.on_host(overlaps, inputs, words.ctypes.data, threads)
    run.on_host(nms_keep_launch(rows, count), [words.ctypes.data], keep[1].ctypes.data, threads)
    assert (words[-64:] == -7).all()
    assert (keep[:, groups.size :] == 7).all()
    assert (keep[:, : groups.size] <= 1).all()
    np.testing.assert_array_equal(keep[0], keep[1])
    return keep[0, : groups.size].reshape(groups.shape) == 1


def greedy_keeps(boxes: np.ndarray, groups: np.ndarray, threshold: float) -> np.ndarray:
    """Box by box, by the definition; each step is rounded to f32."""
    keep = np.ones(groups.shape, bool)
    limit = np.float32(float32_below(threshold))
    for row, (corners, ids) in enumerate(zip(boxes.astype(np.float32), groups, strict=True)):
        low, high = corners[:, :2], corners[:, 2:]
        area = (high - low).prod(1)
        for j in range(1, len(ids)):
            sides = np.minimum(high[:j], high[j]) - np.maximum(low[:j], low[j])
            common = sides.prod(1)
            iou = common / (area[:j] + area[j] - common)
            rivals = keep[row, :j] & (ids[:j] == ids[j]) & (sides > 0).all(1)
            keep[row, j] = not (rivals & (iou > limit)).any()
    return keep


def torchvision_keeps(boxes: np.ndarray, groups: np.ndarray, threshold: float) -> np.ndarray:
    keep = np.zeros(groups.shape, bool)
    for row in range(len(groups)):
        for group in np.unique(groups[row]):
            members = np.where(groups[row] == group)[0]
            rank = torch.arange(len(members), 0, -1, dtype=torch.float32)
            kept = torchvision.ops.nms(torch.from_numpy(boxes[row, members]), rank, threshold)
            keep[row, members[kept.numpy()]] = True
    return keep


@pytest.mark.parametrize("case", range(20))
def test_nms_keeps_torchvisions_sets(case: int) -> None:
    """A thousand rows in all; every second case has small integers: equal IoUs, equal boxes."""
    random = np.random.default_rng(case)
    count = int(random.integers(1, 130))
    corner = random.uniform(0, 30, (50, count, 2))
    boxes = np.concatenate((corner, corner + random.uniform(0, 20, (50, count, 2))), axis=2)
    boxes = boxes.round(0 if case % 2 else 7).astype(np.float32)
    groups = random.integers(0, 1 + case % 3, (50, count))
    threshold = float(random.choice([0.0, 0.25, 0.3, 0.5, 0.7, random.uniform()]))
    ours = keeps(boxes, groups, threshold, threads=1 + case % 2)
    assert np.array_equal(ours, torchvision_keeps(boxes, groups, threshold))
    assert count < 20 or not ours.all()


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 1000, 2500])
def test_nms_of_any_number_of_boxes(count: int) -> None:
    random = np.random.default_rng(count)
    corner = random.uniform(0, 300, (2, count, 2))
    boxes = np.concatenate((corner, corner + random.uniform(5, 60, (2, count, 2))), axis=2)
    boxes, groups = boxes.astype(np.float32), np.zeros((2, count), np.int32)
    ours = keeps(boxes, groups, 0.3)
    assert np.array_equal(ours, torchvision_keeps(boxes, groups, 0.3))
    assert count < 500 or 50 < ours[0].sum() < count / 2


def test_nms_boxes_of_nan_and_infinity_leave_others_alone() -> None:
    sound = [[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]
    odd = [[0.0, 0, 10, NAN], [NAN] * 4, [0, 0, INF, INF], [-INF, -INF, INF, INF], [5, 5, 5, 5],
           [9, 9, 1, 1]]  # fmt: skip
    boxes = np.array([[*odd, *sound, *odd]], np.float32)
    keep = keeps(boxes, np.zeros((1, 15), np.int32), 0.5)[0].tolist()
    assert keep == [True] * 6 + [True, False, True] + [True] * 6


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000, 1025])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
def test_nms_is_the_greedy_definition(count: int, threshold: float) -> None:
    """Rows of one group, of a few, of many; some boxes are equal, points, inside out or not numbers."""
    random = np.random.default_rng(count)
    corner = random.uniform(0, 60, (3, count, 2)).round()
    boxes = np.concatenate((corner, corner + random.integers(0, 30, (3, count, 2))), axis=2)
    odd = random.random((3, count, 4))
    boxes[odd < 0.01] = NAN
    boxes[(odd > 0.01) & (odd < 0.015)] = INF
    boxes[(odd > 0.015) & (odd < 0.02)] = -INF
    turned = random.random((3, count)) < 0.02
    boxes[turned] = boxes[turned][:, [2, 3, 0, 1]]
    groups = random.integers(0, [[1], [5], [400]], (3, count))
    ours = keeps(boxes, groups, threshold, threads=2)
    assert np.array_equal(ours, greedy_keeps(boxes, groups, threshold))
    assert count < 1000 or [*ours.sum(1)] == sorted({*ours.sum(1)})  # fewer groups suppress more


def test_nms_refuses_a_threshold_that_is_none() -> None:
    for launch in (nms_launch, nms_overlaps_launch):
        with pytest.raises(KernelError, match=r"iou_threshold=-0.1; it must be in 0\.\.1"):
            launch(1, 1, -0.1)


def test_nms_in_two_launches_refuses_rows_that_are_too_long() -> None:
    corner = np.random.default_rng(0).uniform(0, 300, (1, MAX_BOXES, 2))
    boxes, groups = np.concatenate((corner, corner + 20), axis=2), np.zeros((1, MAX_BOXES))
    assert 0 < keeps(boxes, groups, 0.3).sum() < MAX_BOXES
    with pytest.raises(KernelError, match="8193 boxes per row; NmsKeep takes at most 8192"):
        nms_keep_launch(1, MAX_BOXES + 1)
    with pytest.raises(KernelError, match="blocks of work"):
        nms_overlaps_launch(2**17, MAX_BOXES, 0.3)


def test_a_folder_that_libraries_do_not_load_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home mounted noexec: the temporary folder is tried, then PyTorch may fall back."""
    load, refused = ctypes.CDLL, [compile._cache_folder()]

    def guarded_load(name: str) -> ctypes.CDLL:
        if Path(name).parent in refused:
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name)

    build = compile.host_library.__wrapped__
    monkeypatch.setattr(ctypes, "CDLL", guarded_load)
    assert Path(build("sorted_nms")._name).parent == compile._temporary_folder()
    refused.append(compile._temporary_folder())
    with pytest.raises(KernelUnavailableError, match="no folder to load kernels from"):
        build("sorted_nms")


@pytest.mark.parametrize("source", ["pyramid_roi_align", "sorted_nms", "paste_masks"])
def test_entries_are_what_the_library_holds(source: str) -> None:
    library, names = compile.host_library(source), compile.entries(source)
    assert names
    assert all(hasattr(library, f"{name}_host") for name in names)
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library._name], capture_output=True, text=True, check=True
    ).stdout
    assert symbols.count("_host\n") == len(names)
