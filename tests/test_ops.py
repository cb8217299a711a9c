"""The two custom operators and their helpers against torchvision and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given
from strategies import FEW, random_boxes, seeds, thresholds
from torch import Tensor
from torchvision.ops.poolers import LevelMapper

from comask.errors import KernelError, KernelUnavailableError
from comask.kernels import run
from comask.models import nms, roi_align
from comask.models.nms import float32_below, sorted_nms, top_k
from comask.models.roi_align import (
    STRIDES,
    dense_roi_align,
    pool_rows,
    pyramid_roi_align,
    roi_levels,
)

BOUNDARIES = (112.0, 224.0, 448.0)


def greedy(boxes: Tensor, groups: Tensor, threshold: float) -> list[bool]:
    """Non-maximum suppression as its definition reads, in f32."""
    b, ids = boxes.numpy(), groups.numpy()
    areas = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    kept: list[int] = []
    for i in range(len(b)):
        for j in kept:
            w = max(np.float32(0), min(b[i, 2], b[j, 2]) - max(b[i, 0], b[j, 0]))
            h = max(np.float32(0), min(b[i, 3], b[j, 3]) - max(b[i, 1], b[j, 1]))
            union = areas[i] + areas[j] - w * h
            if ids[i] == ids[j] and union > 0 and float(w * h / union) > threshold:
                break
        else:
            kept.append(i)
    return [i in kept for i in range(len(b))]


@FEW
@given(seed=seeds, threshold=thresholds)
@example(seed=0, threshold=0.5)
def test_sorted_nms_equals_the_greedy_definition(seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, 40, 40, 40).round()  # integers: equal overlaps and ties
    boxes[5] = boxes[3]  # identical
    boxes[6] = boxes[3]
    boxes[8, 2] = boxes[8, 0]  # degenerate
    boxes[9] = boxes[10] = 0
    groups = torch.randint(0, 3, (2, 40), generator=generator, dtype=torch.int32)
    batch = torch.stack((boxes, boxes.flip(0)))
    keep = sorted_nms(batch, groups, threshold)
    for row in range(2):
        assert keep[row].tolist() == greedy(batch[row], groups[row], threshold)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_sorted_nms_keeps_what_torchvision_keeps(threshold: float) -> None:
    generator = torch.Generator().manual_seed(3)
    boxes = random_boxes(generator, 300, 100, 60)
    groups = torch.randint(0, 5, (300,), generator=generator)
    falling = torch.linspace(1, 0, 300)
    for ids, kept in (
        (groups, torchvision.ops.batched_nms(boxes, falling, groups, threshold)),
        (torch.zeros_like(groups), torchvision.ops.nms(boxes, falling, threshold)),
    ):
        keep = sorted_nms(boxes[None], ids[None], threshold)[0]
        assert 0 < len(kept) < 300
        assert torch.where(keep)[0].tolist() == kept.sort().values.tolist()


@FEW
@given(seed=seeds, threshold=thresholds)
def test_sorted_nms_is_idempotent(seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, 60, 30, 30)
    groups = torch.randint(0, 3, (60,), generator=generator)
    keep = sorted_nms(boxes[None], groups[None], threshold)[0]
    assert sorted_nms(boxes[keep][None], groups[keep][None], threshold).all()


def test_an_overlap_of_exactly_the_threshold_survives() -> None:
    boxes = torch.tensor([[[0.0, 0, 2, 1], [0, 0, 1, 1], [0, 0, 1.5, 1]]])
    keep = sorted_nms(boxes, torch.zeros(1, 3, dtype=torch.int32), 0.5)
    assert keep.tolist() == [[True, True, False]]


@FEW
@given(threshold=thresholds, seed=seeds)
@example(threshold=0.3, seed=0)
@example(threshold=0.7, seed=0)
@example(threshold=0.0, seed=0)
def test_float32_below_is_the_f32_that_compares_alike(threshold: float, seed: int) -> None:
    below = np.float32(float32_below(threshold))
    assert float(below) == float32_below(threshold)  # it is an f32
    above = np.nextafter(below, np.float32(math.inf))
    assert float(below) <= threshold < float(above)
    near = [np.nextafter(below, np.float32(-math.inf)), below, above]
    ious = np.array([*near, *np.random.default_rng(seed).random(20)], np.float32)
    assert ((ious > below) == (ious.astype(np.float64) > threshold)).all()


def test_top_k_gives_ties_to_the_lower_index() -> None:
    values, order = top_k(torch.ones(2, 1000), 10)
    assert order.tolist() == [list(range(10))] * 2
    assert torch.equal(values, torch.ones(2, 10))
    _, order = top_k(torch.tensor([1.0, 3, 2, 3, -math.inf, 2]), 5)
    assert order.tolist() == [1, 3, 2, 5, 0]


@pytest.mark.parametrize("canonical", [224.0, 56.0])
def test_roi_levels_equal_torchvisions(canonical: float) -> None:
    generator = torch.Generator().manual_seed(4)
    boxes = random_boxes(generator, 4000, 800, 5.5 * canonical)
    ours = roi_levels(boxes[None], canonical)[0]
    expected = LevelMapper(2, 5, canonical_scale=int(canonical))([boxes])
    assert torch.equal(ours, expected)
    assert ours.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(("factor", "drop"), [(1.0, 0), (0.9999, 1), (1.0001, 0)])
def test_roi_levels_change_at_their_exact_boundaries(level: int, factor: float, drop: int) -> None:
    side = BOUNDARIES[level - 1] * factor
    square = torch.tensor([[0.0, 0, side, side]])
    flat = torch.tensor([[0.0, 0, 2 * side, side / 2]])
    for roi in (square, flat):
        assert roi_levels(roi, 224.0).item() == level - drop
        assert LevelMapper(2, 5)([roi]).item() == level - drop


def pyramid(batch: int = 2, size: int = 512) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(batch, 3, size // s, size // s, generator=generator) for s in (4, 8, 16, 32, 64)
    ]


@pytest.mark.parametrize(("size", "sampling"), [(7, 2), (14, 2), (7, 1)])
def test_pyramid_roi_align_pools_each_roi_from_torchvisions_level(size: int, sampling: int) -> None:
    generator = torch.Generator().manual_seed(6)
    maps = pyramid()
    small, large = (random_boxes(generator, 12, 300, side) for side in (150, 600))
    rois = torch.stack((torch.cat((small, large)), torch.cat((large, small)).flip(0)))
    levels = LevelMapper(2, 5)(list(rois))
    assert levels.unique().tolist() == [0, 1, 2, 3]
    expected = []
    for i, roi in enumerate(rois.reshape(-1, 4)):
        image, level = i // 24, int(levels[i])
        pooled = torchvision.ops.roi_align(
            maps[level][image : image + 1],
            [roi[None]],
            size,
            1 / 2 ** (level + 2),
            sampling,
            aligned=True,
        )
        expected.append(pooled[0])
    ours = pyramid_roi_align(maps, rois, size, sampling_ratio=sampling, canonical_size=224.0)
    torch.testing.assert_close(ours, torch.stack(expected))


def test_a_linear_map_is_pooled_at_bin_centres() -> None:
    column = torch.arange(128.0)[None, None, None].expand(1, 3, 128, 128)  # of P2: 4 pixels each
    rois = torch.tensor([[[40.0, 40, 96, 96]]])
    pooled = pyramid_roi_align(
        [column, *pyramid(1)[1:4]], rois, 7, sampling_ratio=2, canonical_size=224.0
    )
    centres = (40 + 56 * (torch.arange(7) + 0.5) / 7) / 4 - 0.5  # pixel j lies at j + 0.5
    torch.testing.assert_close(pooled[0, 0], centres.expand(7, 7))


def test_degenerate_and_outside_rois_are_finite() -> None:
    rois = torch.tensor([[[0.0, 0, 0, 0], [50, 50, 50, 80], [-900, -900, -700, -700]]])
    outside = torch.tensor([[5000.0, 5000, 5600, 5600], [-50, -50, 600, 600], [30, 30, 10, 10]])
    rois = torch.cat((rois, outside[None]), dim=1)
    pooled = pyramid_roi_align(pyramid(1), rois, 7, sampling_ratio=2, canonical_size=224.0)
    assert torch.isfinite(pooled).all()
    assert pooled[0].abs().max() > 0  # a point is read where it lies
    assert not pooled[[2, 3]].any()  # nothing lies out there


def test_no_rois_give_an_empty_result() -> None:
    pooled = pyramid_roi_align(
        pyramid(), torch.zeros(2, 0, 4), 14, sampling_ratio=2, canonical_size=224.0
    )
    assert pooled.shape == (0, 3, 14, 14)


def rows_of(count: int, seed: int) -> Tensor:
    """[R, 5] of two images and all levels of 512 × 512 pixels."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, count, 250, 1)
    boxes[:, 2:] += 30 * 2 ** (5 * torch.rand(count, 1, generator=generator))
    image = torch.randint(0, 2, (count, 1), generator=generator)
    return torch.cat((image, boxes), dim=1)


def by_matrices(maps: list[Tensor], rows: Tensor, size: int) -> Tensor:
    """`pool_rows` by `dense_roi_align`."""
    levels = roi_levels(rows[:, 1:], 224.0)
    order = levels.argsort(stable=True)
    parts = [
        dense_roi_align(features, rows[levels == level], size, 1 / STRIDES[level], 2)
        for level, features in enumerate(maps)
    ]
    return torch.cat(parts)[order.argsort()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rois_per_image", [0, 15])
def test_gradient_of_the_kernels_operator(layout: torch.memory_format, rois_per_image: int) -> None:
    rows = rows_of(30, 1)
    rows[:, 0] = torch.arange(2).repeat_interleave(15)
    assert roi_levels(rows[:, 1:], 224.0).unique().tolist() == [0, 1, 2, 3]
    weight = torch.randn(30, 3, 7, 7, generator=torch.Generator().manual_seed(2))
    gradients = []
    for kernel in (True, False):
        maps = [m.contiguous(memory_format=layout).requires_grad_() for m in pyramid()[:4]]
        rois = rows[:, 1:] if rois_per_image else rows
        pooled = (
            torch.ops.comask.pyramid_roi_align(*maps, rois, rois_per_image, 7, 2, 224.0)
            if kernel
            else by_matrices(maps, rows, 7)
        )
        gradients.append(torch.autograd.grad(pooled, maps, weight))
    assert all(gradient.any() for gradient in gradients[0])
    # A place near 100 is known to 8e-6 of a pixel, and so are the shares of a dozen samples that a
    # pixel adds up.
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_gradients_are_made_for_the_maps_that_want_one() -> None:
    maps = pyramid()[:4]
    maps[1].requires_grad_()
    rows = rows_of(30, 2)
    pooled = torch.ops.comask.pyramid_roi_align(*maps, rows, 0, 7, 2, 224.0)
    pooled.sum().backward()
    on_p3 = roi_levels(rows[:, 1:], 224.0) == 1
    assert maps[1].grad is not None
    assert maps[1].grad.sum().item() == pytest.approx(on_p3.sum().item() * 3 * 49, rel=1e-4)


def test_training_and_inference_pool_alike() -> None:
    rows = rows_of(40, 3)
    kernel = pool_rows(pyramid(), rows, 14, 2, 224.0)
    trained = pool_rows([m.requires_grad_() for m in pyramid()], rows, 14, 2, 224.0)
    assert trained.requires_grad
    torch.testing.assert_close(kernel, trained, rtol=0, atol=5e-5)  # places round differently


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_and_layouts_of_maps(dtype: torch.dtype) -> None:
    rows = rows_of(20, 4)
    maps = [m.to(dtype).to(memory_format=torch.channels_last) for m in pyramid()]
    expected = pool_rows([m.float() for m in maps], rows, 7, 2, 224.0).to(dtype)
    for first in (maps[0], maps[0].contiguous()):
        pooled = pool_rows([first, *maps[1:]], rows, 7, 2, 224.0)
        same = first.is_contiguous(memory_format=torch.channels_last)
        assert pooled.is_contiguous(memory_format=torch.channels_last) == same
        assert torch.equal(pooled, expected)
    apart = [torch.stack((m, m), dim=4)[..., 0] for m in maps]
    assert torch.equal(pool_rows(apart, rows, 7, 2, 224.0), expected)


def test_roi_align_refuses_mixed_types_and_devices() -> None:
    maps, rows = pyramid()[:4], rows_of(6, 7)
    with pytest.raises(ValueError, match="the maps must be of one type"):
        pool_rows([*maps[:3], maps[3].half()], rows, 7, 2, 224.0)
    body = roi_align._pyramid_roi_align._init_fn  # a meta tensor would be sent to the fake instead
    with pytest.raises(ValueError, match="all on one device"):
        body(*maps[:3], maps[3].to("meta"), rows, 0, 7, 2, 224.0)
    with pytest.raises(ValueError, match="float32 on meta"):
        body(*maps, rows.to("meta"), 0, 7, 2, 224.0)


def test_nms_refuses_boxes_that_do_not_fit_the_groups() -> None:
    boxes, groups = torch.zeros(2, 9, 4), torch.zeros(2, 9, dtype=torch.int32)
    for wrong in (boxes[:1], boxes[:, :8], boxes[..., :3], boxes[0]):
        with pytest.raises(ValueError, match=r"expected \[G, M, 4\] and \[G, M\] on one device"):
            sorted_nms(wrong, groups, 0.5)
    with pytest.raises(ValueError, match=r"group_ids .* on meta"):
        nms._sorted_nms._init_fn(boxes, groups.to("meta"), 0.5)


@pytest.mark.parametrize("count", [0, 1, 33, 300])
def test_nms_in_the_two_launches_of_a_gpu(count: int) -> None:
    boxes = random_boxes(torch.Generator().manual_seed(7), 3 * count, 40, 40).view(3, count, 4)
    groups = torch.arange(3 * count, dtype=torch.int32).view(3, count) % 2
    keep = torch.full((3, count), 7, dtype=torch.uint8).view(torch.bool)
    nms._run_halves(boxes, groups, 0.5, keep)
    assert torch.equal(keep, sorted_nms(boxes, groups, 0.5))
    assert count < 300 or 0 < keep.sum() < keep.numel() * 0.9


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_nms_of_boxes_that_lie_between_vectors(
    offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view may begin anywhere; a GPU's vector loads may not."""
    boxes = random_boxes(torch.Generator().manual_seed(8), 40, 40, 40)[None]
    groups = torch.zeros(1, 40, dtype=torch.int32)
    view = torch.empty(offset + boxes.numel())[offset:].view(boxes.shape).copy_(boxes)
    assert view.data_ptr() % 16
    seen = []

    def launch(kernel: object, inputs: list[Tensor], output: Tensor) -> None:
        seen.append(inputs[0].data_ptr() % 16)
        run.on_tensors(kernel, inputs, output)  # type: ignore[arg-type]

    monkeypatch.setattr(nms, "on_tensors", launch)
    assert torch.equal(sorted_nms(view, groups, 0.5), sorted_nms(boxes, groups, 0.5))
    assert seen == [0, 0]


def test_only_a_missing_compiler_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    available = run.available.__wrapped__
    for error, falls_back in ((KernelUnavailableError("none"), True), (KernelError("bad"), False)):

        def fail(source: str, error: KernelError = error) -> None:
            raise error

        monkeypatch.setattr("comask.kernels.compile.host_library", fail)
        if falls_back:
            assert not available("sorted_nms", torch.device("cpu"))
        else:
            with pytest.raises(KernelError, match="bad"):
                available("sorted_nms", torch.device("cpu"))


def test_operators_are_what_pytorch_asks_of_them() -> None:
    maps = [m.requires_grad_() for m in pyramid(size=128)[:4]]
    arguments = (*maps, rows_of(6, 5), 0, 7, 2, 224.0)
    torch.library.opcheck(torch.ops.comask.pyramid_roi_align.default, arguments)
    last = [m.detach().to(memory_format=torch.channels_last) for m in maps]
    arguments = (*last, rows_of(6, 5)[:, 1:], 3, 7, 2, 224.0)
    torch.library.opcheck(torch.ops.comask.pyramid_roi_align.default, arguments)
    generator = torch.Generator().manual_seed(0)
    arguments = (random_boxes(generator, 9, 9, 9)[None], torch.zeros(1, 9, dtype=torch.int64), 0.5)
    torch.library.opcheck(torch.ops.comask.sorted_nms.default, arguments)


def test_operators_under_torch_compile() -> None:
    def both(maps: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        pooled = pyramid_roi_align(maps, rois, 7, sampling_ratio=2, canonical_size=224.0)
        return pooled * 2, sorted_nms(rois, rois[..., 0].int() % 2, 0.5)

    rois = rows_of(20, 6)[:, 1:].view(2, 10, 4)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for mine, plain in zip(compiled(pyramid(), rois), both(pyramid(), rois), strict=True):
        assert torch.equal(mine, plain)
