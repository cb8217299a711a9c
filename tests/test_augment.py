"""Augmentation: boxes and masks stay exact, and everything depends on (seed, epoch, image) alone."""

from __future__ import annotations

import colorsys
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run, settings
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import FEW, seeds
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Mask

from comask.config import Config, DataConfig, PreprocessConfig
from comask.config_reading import override
from comask.data.augment import Sample, augment, coloured, cropped, flipped, turned, with_pasted
from comask.data.loading import epoch_batches, load_batches
from comask.data.shapes import ShapesSource
from comask.data.source import Category, ImageInfo
from comask.data.training_set import Item, TrainingSet
from comask.errors import ConfigError

SIZE = PreprocessConfig(short_side=48, max_side=80)
FINE = 4  # boxes lie on quarters of pixels, which f32 holds exactly
PASTED = 100  # the first label of a donor
ALL_ON = DataConfig(
    flip_probability=0.5,
    vertical_flip_probability=0.5,
    turn_probability=0.5,
    short_sides=(40, 48, 64),
    scale_range=(0.5, 2.0),
    copy_paste_probability=0.7,
    colour=0.4,
)


@st.composite
def samples(draw: st.DrawFn, first_label: int = 0, most: int = 4) -> Sample:
    """An image whose pixels tell their place, with any masks, and boxes on or beside them."""
    rng = np.random.default_rng(draw(seeds))
    height, width, count = draw(
        st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, most))
    )
    masks, boxes = [], []
    for number in range(count):
        y1, x1 = rng.integers(height), rng.integers(width)
        h, w = rng.integers(1, height - y1 + 1), rng.integers(1, width - x1 + 1)
        bitmap = np.zeros((height, width), bool)
        bitmap[y1 : y1 + h, x1 : x1 + w] = rng.random((h, w)) < rng.choice([0.2, 0.7, 1.0])
        bitmap[y1, x1] = True
        masks.append(crop_of(bitmap))
        loose = random_box(rng, height, width)
        boxes.append(loose if number % 2 else bounds_of(bitmap[None])[0])
    y, x = np.indices((height, width))
    return Sample(
        pixels=np.stack([y, x, y + x], axis=2).astype(np.uint8),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        crowds=np.array([random_box(rng, height, width) for _ in range(count // 2)], np.float32)
        .reshape(-1, 4),
        labels=list(range(first_label, first_label + count)),
        masks=masks,
    )  # fmt: skip


def random_box(rng: np.random.Generator, height: int, width: int) -> list[float]:
    x1, y1 = rng.integers(FINE * width), rng.integers(FINE * height)
    x2, y2 = rng.integers(x1 + 1, FINE * width + 1), rng.integers(y1 + 1, FINE * height + 1)
    return [x1 / FINE, y1 / FINE, x2 / FINE, y2 / FINE]


def crop_of(bitmap: NDArray[np.bool_]) -> tuple[int, int, NDArray[np.bool_]]:
    x1, y1, x2, y2 = map(int, bounds_of(bitmap[None])[0])
    return x1, y1, bitmap[y1:y2, x1:x2]


def bounds_of(bitmaps: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[G, 4] by torchvision, whose corners are pixels; none may be empty."""
    boxes = masks_to_boxes(torch.from_numpy(np.array(bitmaps))).numpy()
    return np.asarray(boxes + np.array([0, 0, 1, 1]), np.float32)


def dense(sample: Sample) -> NDArray[np.bool_]:
    """[G, h, w]; every crop must have its mask's bounds."""
    bitmaps = np.zeros((len(sample.masks), *sample.size), bool)
    for bitmap, (x, y, crop) in zip(bitmaps, sample.masks, strict=True):
        assert x >= 0
        assert y >= 0
        bitmap[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        tight = [x, y, x + crop.shape[1], y + crop.shape[0]]
        assert bounds_of(bitmap[None])[0].tolist() == tight
    return bitmaps


def tv_boxes(boxes: NDArray[np.float32], size: tuple[int, int]) -> BoundingBoxes:
    return BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=size)


def require_same(a: Sample, b: Sample) -> None:
    np.testing.assert_array_equal(a.pixels, b.pixels)
    np.testing.assert_array_equal(dense(a), dense(b))
    np.testing.assert_array_equal(a.boxes, b.boxes)
    np.testing.assert_array_equal(a.crowds, b.crowds)
    assert a.labels == b.labels


@FEW
@given(samples(), st.booleans())
def test_flips_are_those_of_torchvision(sample: Sample, vertically: bool) -> None:
    flip = F.vertical_flip if vertically else F.horizontal_flip
    result = flipped(sample, vertically=vertically)
    pixels = flip(torch.from_numpy(sample.pixels).permute(2, 0, 1)).permute(1, 2, 0)
    np.testing.assert_array_equal(result.pixels, pixels.numpy())
    np.testing.assert_array_equal(dense(result), flip(Mask(dense(sample))).numpy())
    for ours, before in ((result.boxes, sample.boxes), (result.crowds, sample.crowds)):
        np.testing.assert_array_equal(ours, flip(tv_boxes(before, sample.size)).numpy())
    assert result.labels == sample.labels
    require_same(flipped(result, vertically=vertically), sample)


def painted(boxes: NDArray[np.float32], size: tuple[int, int]) -> torch.Tensor:
    """Boxes as bitmaps of quarters of pixels."""
    bitmaps = torch.zeros((len(boxes), size[0] * FINE, size[1] * FINE), dtype=torch.bool)
    for bitmap, box in zip(bitmaps, boxes, strict=True):
        x1, y1, x2, y2 = (int(side * FINE) for side in box)
        bitmap[y1:y2, x1:x2] = True
    return bitmaps


@FEW
@given(samples(), st.integers(1, 3))
def test_turns_are_those_of_torch(sample: Sample, quarters: int) -> None:
    result = turned(sample, quarters)
    pixels = torch.rot90(torch.from_numpy(sample.pixels), quarters, (0, 1))
    np.testing.assert_array_equal(result.pixels, pixels.numpy())
    bitmaps = torch.rot90(torch.from_numpy(dense(sample)), quarters, (1, 2))
    np.testing.assert_array_equal(dense(result), bitmaps.numpy())
    for ours, before in ((result.boxes, sample.boxes), (result.crowds, sample.crowds)):
        expected = torch.rot90(painted(before, sample.size), quarters, (1, 2))
        assert torch.equal(painted(ours, result.size), expected)
    assert result.labels == sample.labels
    require_same(turned(result, 4 - quarters), sample)


@FEW
@given(samples(), st.floats(1, 30), seeds)
def test_a_crop_cuts_boxes_only_with_their_objects(
    sample: Sample, factor: float, seed: int
) -> None:
    result = cropped(sample, factor, np.random.default_rng(seed))
    top, left = result.pixels[0, 0, :2].tolist()
    size = tuple(max(1, round(side / factor)) for side in sample.size)
    place = (top, left, *size)
    assert result.size == size
    pixels = F.crop(torch.from_numpy(sample.pixels).permute(2, 0, 1), *place).permute(1, 2, 0)
    np.testing.assert_array_equal(result.pixels, pixels.numpy())
    before = dense(sample)
    bitmaps = F.crop(Mask(before), *place).numpy().reshape(-1, *size)
    kept = np.flatnonzero(bitmaps.any(axis=(1, 2)))
    assert result.labels == [sample.labels[i] for i in kept]
    np.testing.assert_array_equal(dense(result), bitmaps[kept])
    clamped = F.crop(tv_boxes(sample.boxes, sample.size), *place).numpy()
    for box, i in zip(result.boxes, kept, strict=True):
        moved = sample.boxes[i] - np.array([left, top, left, top], np.float32)
        cut = bitmaps[i].sum() < before[i].sum() or not np.array_equal(moved, clamped[i])
        expected = bounds_of(bitmaps[i : i + 1])[0] if cut else moved
        np.testing.assert_array_equal(box, expected)
    crowds = F.crop(tv_boxes(sample.crowds, sample.size), *place).numpy()
    there = (crowds[:, 2:] > crowds[:, :2]).all(axis=1)
    np.testing.assert_array_equal(result.crowds, crowds[there])


@FEW
@given(samples(), samples(first_label=PASTED), seeds)
def test_a_pixel_belongs_to_the_object_that_it_shows(
    sample: Sample, donor: Sample, seed: int
) -> None:
    """A donor of one colour shows what its objects hide."""
    colour = 200
    donor = replace(donor, pixels=np.full_like(donor.pixels, colour))
    result = with_pasted(sample, donor, SIZE, np.random.default_rng(seed))
    assert result.size == sample.size
    hidden = (result.pixels == colour).all(axis=2)
    np.testing.assert_array_equal(result.pixels[~hidden], sample.pixels[~hidden])
    before, after = dense(sample), dense(result)
    is_pasted = np.array(result.labels) >= PASTED
    np.testing.assert_array_equal(after[is_pasted].sum(axis=0), hidden)  # each pixel once
    pasted = [label for label in result.labels if label >= PASTED]
    assert pasted == sorted(set(pasted) & set(donor.labels))
    rest = before & ~hidden
    kept = np.flatnonzero(rest.any(axis=(1, 2)))
    assert result.labels == [sample.labels[i] for i in kept] + pasted
    np.testing.assert_array_equal(after[~is_pasted], rest[kept])
    for box, i in zip(result.boxes, kept, strict=False):
        changed = (rest[i] != before[i]).any()
        expected = bounds_of(rest[i : i + 1])[0] if changed else sample.boxes[i]
        np.testing.assert_array_equal(box, expected)
    np.testing.assert_array_equal(result.boxes[is_pasted], bounds_of(after[is_pasted]))
    np.testing.assert_array_equal(result.crowds, sample.crowds)


def disc(side: int, radius: float, colour: int, label: int) -> Sample:
    """One disc in the middle of a black square."""
    offset = np.arange(side) + 0.5 - side / 2
    bitmap = offset[:, None] ** 2 + offset**2 <= radius**2
    pixels = np.where(bitmap[..., None], np.uint8(colour), np.uint8(0)).repeat(3, axis=2)
    return Sample(
        pixels=pixels,
        boxes=bounds_of(bitmap[None]),
        crowds=np.zeros((0, 4), np.float32),
        labels=[label],
        masks=[crop_of(bitmap)],
    )


@pytest.mark.parametrize("side", [60, 480])
def test_pasted_objects_have_their_size_and_their_pixels(side: int) -> None:
    """The donor's disc has a diameter of a third of its image, whatever its resolution."""
    image = disc(120, 3, 50, 0)
    donor = disc(side, side / 6, 200, PASTED)
    diameters, dark = [], []
    for seed in range(60):
        result = with_pasted(image, donor, SIZE, np.random.default_rng(seed))
        if PASTED not in result.labels:
            continue
        x1, y1, x2, y2 = result.boxes[result.labels.index(PASTED)]
        assert abs((x2 - x1) - (y2 - y1)) <= 1
        diameters.append(x2 - x1)
        shown = result.pixels[dense(result)[result.labels.index(PASTED)]]
        dark.append((shown < 95).mean())  # a pixel on the edge mixes the object and its background
    assert np.mean(dark) < 0.008  # masks and pixels are resized with the same grid
    assert 15 < len(diameters) < 45
    assert 19 <= min(diameters) < 25
    assert 55 < max(diameters) <= 61


def test_objects_larger_than_the_image_keep_their_shape() -> None:
    donor = disc(300, 149, 200, PASTED)
    image = disc(100, 3, 50, 0)
    image = flipped(
        replace(image, pixels=image.pixels[40:60], masks=[], boxes=image.boxes[:0], labels=[])
    )
    for seed in range(20):
        result = with_pasted(image, donor, SIZE, np.random.default_rng(seed))
        for x1, y1, x2, y2 in result.boxes:
            assert abs((x2 - x1) - (y2 - y1)) <= 1
            assert y2 - y1 <= 20


@FEW
@given(seeds, st.sampled_from([0.1, 0.4, 0.9]))
def test_colours_change_by_their_strength_and_alike_everywhere(seed: int, strength: float) -> None:
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (6, 3), np.uint8)
    places = rng.integers(6, size=(9, 7))
    before = palette[places]
    after = coloured(before, strength, np.random.default_rng(seed))
    assert after.shape == before.shape
    assert after.dtype == np.uint8
    for number in range(6):  # what looks alike still does, so no pixel was moved
        assert len(np.unique(after[places == number], axis=0)) <= 1
    gray = coloured(np.full((5, 4, 3), 100, np.uint8), strength, np.random.default_rng(seed))
    assert abs(gray.astype(float) - 100).max() <= 100 * strength + 2
    red = coloured(
        np.full((5, 4, 3), (200, 50, 50), np.uint8), strength, np.random.default_rng(seed)
    )
    hue, saturation, _ = colorsys.rgb_to_hsv(*(red[0, 0] / 255))
    if saturation > 0.3:  # the hue of a gray is arbitrary
        assert min(hue, 1 - hue) <= 0.1 * strength + 0.02


def test_colours_become_brighter_and_darker_and_change_their_hue() -> None:
    gray, red = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), (200, 50, 50), np.uint8)
    values = [coloured(gray, 0.4, np.random.default_rng(seed))[0, 0, 0] for seed in range(40)]
    assert min(values) < 70
    assert max(values) > 130
    shades = [coloured(red, 0.4, np.random.default_rng(seed))[0, 0] for seed in range(40)]
    assert any(int(g) - int(b) > 5 for _, g, b in shades)
    assert any(int(b) - int(g) > 5 for _, g, b in shades)


def training_set(config: DataConfig, seed: int = 0, images: int = 12) -> TrainingSet:
    source = ShapesSource(num_images=images, seed=8)
    return TrainingSet(source, list(range(images)), SIZE, config=config, seed=seed)


def content(item: Item) -> list[Any]:
    """A target's places on the CPU among them, everything as plain values."""
    canvas, size, target, image_id = item
    tensors = (
        canvas, target.boxes, target.crowds, target.labels, target.masks.pixels,
        target.masks.places, target.mask_scale,
    )  # fmt: skip
    return [*(t.tolist() for t in tensors), target.masks.image_size, size, target.seed, image_id]


def test_an_item_depends_on_seed_epoch_and_image_alone() -> None:
    keys = [(epoch, index) for epoch in range(2) for index in range(6)]
    data = training_set(ALL_ON)
    expected = {key: content(data[key]) for key in keys}
    other = training_set(ALL_ON)
    for key in reversed(keys):
        assert content(other[key]) == expected[key]
    for workers in (0, 2):
        with load_batches(training_set(ALL_ON), [[key] for key in keys], workers=workers) as loaded:
            for key, batch in zip(keys, loaded, strict=True):
                ((h, w),) = batch.image_sizes.tolist()
                item = (batch.images[0], (h, w), batch.targets[0], batch.image_ids[0])
                assert content(item) == expected[key]
    assert all(expected[0, index] != expected[1, index] for index in range(6))
    assert all(content(training_set(ALL_ON, seed=1)[key]) != expected[key] for key in keys)


def test_targets_stay_exact_with_everything_on() -> None:
    """The boxes of `shapes` are the bounds of masks, and remain so."""
    data = training_set(ALL_ON, images=40)
    objects = 0
    for key in [(epoch, index) for epoch in range(4) for index in range(40)]:
        canvas, (h, w), target, _ = data[key]
        assert canvas[h:].sum() + canvas[:, w:].sum() == 0
        assert len(target.labels) == len(target.boxes) == len(target.masks.places)
        bitmaps = target.masks.bitmaps().bool().numpy()
        if len(bitmaps):
            corners = (target.boxes * target.mask_scale).numpy()
            np.testing.assert_allclose(corners, bounds_of(bitmaps), atol=1e-3)
            assert (target.boxes[:, 2:] <= torch.tensor([w, h]) + 1e-3).all()
        objects += len(bitmaps)
    assert objects > 200


def test_settings_of_zero_draw_nothing() -> None:
    """A run from before these settings existed can be resumed."""
    sample, other = disc(20, 5, 9, 0), disc(20, 5, 9, 1)
    rng, reference = np.random.default_rng(3), np.random.default_rng(3)
    result, size = augment(sample, DataConfig(), SIZE, rng, lambda: other)
    require_same(result, flipped(sample) if reference.random() < 0.5 else sample)
    assert size == SIZE
    assert rng.random() == reference.random()


@pytest.mark.parametrize("name", ["vertical_flip_probability", "turn_probability"])
def test_probabilities_are_those_of_each_step(name: str) -> None:
    sample = disc(20, 5, 9, 0)
    sample = replace(
        sample, pixels=sample.pixels + np.arange(1200, dtype=np.uint16).reshape(20, 20, 3)
    )
    config = DataConfig(flip_probability=0, **{name: 0.25})
    results = [
        augment(sample, config, SIZE, np.random.default_rng(seed), lambda: sample)[0]
        for seed in range(400)
    ]
    changed = [r for r in results if not np.array_equal(r.pixels, sample.pixels)]
    assert 70 < len(changed) < 130
    kinds = {r.pixels.tobytes() for r in changed}
    expected = (
        {flipped(sample, vertically=True).pixels.tobytes()}
        if name == "vertical_flip_probability"
        else {turned(sample, quarters).pixels.tobytes() for quarters in (1, 2, 3)}
    )
    assert kinds == expected


def sizes(config: DataConfig) -> list[tuple[tuple[int, ...], tuple[int, int], tuple[int, int]]]:
    """(canvas, size on it, size of the masks) of items; all images have 96x128 or 128x96 pixels."""
    data = training_set(replace(config, flip_probability=0.0))
    items = [data[epoch, index] for epoch in range(4) for index in range(12)]
    return [(tuple(i[0].shape[:2]), i[1], i[2].masks.image_size) for i in items]


def test_multi_scale_gives_canvases_of_each_size() -> None:
    found = sizes(DataConfig(short_sides=(30, 48, 70)))
    assert {min(size) for _, size, _ in found} == {30, 48, 60}  # 80 is the longest longer side
    assert {max(size) for _, size, _ in found} == {40, 64, 80}
    for canvas, size, image in found:
        assert canvas == tuple(math.ceil(side / 32) * 32 for side in size)
        assert sorted(image) == [96, 128]


def test_large_scale_jitter_gives_smaller_images_and_parts_of_the_usual_size() -> None:
    assert {tuple(sorted(size)) for _, size, _ in sizes(DataConfig(scale_range=(0.5, 0.5)))} == {
        (24, 32)
    }
    for _, size, image in sizes(DataConfig(scale_range=(2.0, 2.0))):
        assert sorted(size) == [48, 64]
        assert sorted(image) == [48, 64]  # half of each side was cut off
    found = sizes(DataConfig(scale_range=(0.25, 4.0)))
    factors = [
        math.prod(size) / math.prod(image) * (96 * 128) / (48 * 64) for _, size, image in found
    ]
    assert 0.06 <= min(factors) < 0.5  # areas: between 1/16 and 16
    assert 8 < max(factors) <= 16.7
    both = sizes(DataConfig(scale_range=(0.5, 0.5), short_sides=(40,)))
    assert {min(size) for _, size, _ in both} == {20}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("flip_probability=1.5", "data.flip_probability: expected 0 to 1, got 1.5"),
        ("vertical_flip_probability=-1", "data.vertical_flip_probability: expected 0 to 1"),
        ("turn_probability=2", "data.turn_probability: expected 0 to 1"),
        ("copy_paste_probability=1.1", "data.copy_paste_probability: expected 0 to 1"),
        ("colour=1", "data.colour: expected 0 ≤ value < 1"),
        ("repeat_threshold=1", "data.repeat_threshold: expected 0 ≤ value < 1"),
        ("short_sides=[0]", "data.short_sides: expected sides of at least 1"),
        ("short_sides=[900,2000]", "expected sides of at most preprocess.max_side = 1333"),
        ("short_sides=800", "data.short_sides: expected a list"),
        ("scale_range=[0,1]", "data.scale_range: expected [least, most] above 0"),
        ("scale_range=[2,1]", "data.scale_range: expected [least, most] above 0"),
        ("scale_range=[1]", "data.scale_range: expected 2 numbers"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(Config(), (f"data.{setting}",))
    assert words in str(caught.value)
    told = run("train", "--data", "shapes", "--print-config", *settings(f"data.{setting}"))
    assert told.exit_code == 1
    assert told.output.startswith("error: data.")
    assert len(told.output.splitlines()) == 1


class Listed:
    """A source of which only the classes of each image are asked for."""

    categories = tuple(Category(id=id_, name=f"class {id_}") for id_ in range(5))

    def __init__(self, classes: list[list[int]]) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return len(self.classes)

    def info(self, index: int) -> ImageInfo:
        wide = index % 3 == 0
        return ImageInfo(id=index, file_name="", height=9, width=12 if wide else 6)

    def image(self, index: int) -> NDArray[np.uint8]:
        raise NotImplementedError

    def annotations(self, index: int) -> list[dict[str, Any]]:
        crowd = {"category_id": 4, "iscrowd": 1}  # of a class that has no objects
        return [crowd, *({"category_id": id_, "iscrowd": 0} for id_ in self.classes[index])]


def listed_set(classes: list[list[int]], threshold: float) -> TrainingSet:
    config = DataConfig(repeat_threshold=threshold)
    kept = [i for i in range(len(classes)) if i != 1]  # image 1 is for validation
    return TrainingSet(Listed(classes), kept, SIZE, config=config, seed=0)


@FEW
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=3, max_size=40),
    st.sampled_from([0.001, 0.2, 0.5, 0.99]),
)
def test_repeat_factors_are_those_of_lvis(classes: list[list[int]], threshold: float) -> None:
    """r(image) = max over its classes of max(1, sqrt(t / f(class)))."""
    data = listed_set(classes, threshold)
    used = [classes[i] for i in data.indices]
    for found, present in zip(data.repeats, used, strict=True):
        wanted = 1.0
        for class_ in present:
            share = sum(class_ in others for others in used) / len(used)
            wanted = max(wanted, math.sqrt(threshold / share))
        assert found == pytest.approx(wanted, rel=1e-12)
    for epoch in range(3):
        batches = epoch_batches(data, 4, 11, epoch)
        keys = [key for batch in batches for key in batch]
        assert batches == epoch_batches(data, 4, 11, epoch)
        assert len(keys) == data.epoch_length()
        assert abs(data.epoch_length() + 0.5 - data.repeats.sum()) <= 0.5 + 1e-9  # rounded down
        assert len(batches) == math.ceil(data.epoch_length() / 4)
        assert {e for e, _ in keys} == {epoch}
        for index, wanted in zip(data.indices, data.repeats, strict=True):
            times = keys.count((epoch, index))
            assert math.floor(wanted) <= times <= math.ceil(wanted)


def test_fractions_of_repeats_are_met_on_average() -> None:
    classes = [[0]] * 60 + [[0, 1]] * 7 + [[2]] * 3
    data = listed_set(classes, 0.3)
    rng = np.random.default_rng(0)
    counts = np.mean([data.times(rng) for _ in range(2000)], axis=0)
    scale = 1 + (data.epoch_length() - data.repeats.sum()) / (data.repeats % 1).sum()
    expected = np.floor(data.repeats) + data.repeats % 1 * scale
    np.testing.assert_allclose(counts, expected, atol=0.05)
    assert len({tuple(data.times(rng)) for _ in range(20)}) > 1
    assert data.repeats[-1] > 2


def test_without_a_threshold_each_image_occurs_once() -> None:
    data = listed_set([[0]] * 9 + [[1]], 0.0)
    assert data.epoch_length() == 9
    keys = [key for batch in epoch_batches(data, 4, 0, 0) for key in batch]
    assert sorted(index for _, index in keys) == data.indices
