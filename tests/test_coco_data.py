"""COCO-format data sets: reading, writing, batching, flipping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from comask.config import DataConfig, PreprocessConfig
from comask.data.coco import write_coco
from comask.data.layouts import read_data_set
from comask.data.loading import Batch, epoch_batches, load_batches
from comask.data.shapes import ShapesSource
from comask.data.training_set import Key, TrainingSet
from comask.errors import DataError, ImageError
from comask.segmentation import read_segmentation

SQUARE = [[2.0, 2.0, 10.0, 2.0, 10.0, 8.0, 2.0, 8.0]]


def dataset(folder: Path, **changes: Any) -> Path:
    """Two images (one without annotations), category ids with gaps, every kind of segmentation."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number, (w, h) in enumerate([(20, 12), (12, 20)], start=1):
        Image.new("RGB", (w, h), (number * 50, 0, 0)).save(folder / "images" / f"{number}.png")
    common = {"image_id": 7, "bbox": [2, 2, 8, 6], "area": 48}
    counts = [0, 5, 12 * 20 - 5]
    content = {
        "images": [
            {"id": 7, "file_name": "1.png", "width": 20, "height": 12},
            {"id": 9, "file_name": "2.png", "width": 12, "height": 20},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
        "annotations": [
            common | {"id": 0, "category_id": 3, "iscrowd": 0, "segmentation": SQUARE},
            common | {"id": 1, "category_id": 90, "iscrowd": 0,
                      "segmentation": {"size": [12, 20], "counts": counts}},
            common | {"id": 2, "category_id": 3, "iscrowd": 1,
                      "segmentation": {"size": [12, 20], "counts": counts}},
        ],
    }  # fmt: skip
    (folder / "annotations" / "instances.json").write_text(json.dumps(content | changes))
    return folder


def training_set(source: Any, flip: float = 0.0) -> TrainingSet:
    size = PreprocessConfig(short_side=24, max_side=40)
    return TrainingSet(
        source, list(range(len(source))), size, config=DataConfig(flip_probability=flip), seed=0
    )


def loaded(data: TrainingSet, batches: list[list[Key]], workers: int) -> list[Batch]:
    with load_batches(data, batches, workers=workers) as found:
        return list(found)


def test_labels_follow_category_ids_and_crowds_do_not_train(tmp_path: Path) -> None:
    source = read_data_set(dataset(tmp_path / "set"), "train")
    assert [c.name for c in source.categories] == ["car", "toothbrush"]
    assert [len(source.annotations(i)) for i in range(2)] == [3, 0]
    _, size, target, image_id = training_set(source)[(0, 0)]
    assert (image_id, size) == (7, (24, 40))
    assert target.labels.tolist() == [0, 1]
    torch.testing.assert_close(target.boxes, torch.tensor([[4.0, 4, 20, 16]]).expand(2, 4))
    assert target.masks.bitmaps().shape == (2, 12, 20)
    _, _, empty, _ = training_set(source)[(0, 1)]
    assert empty.boxes.shape == (0, 4)
    assert empty.masks.bitmaps().shape == (0, 20, 12)


def test_flip_mirrors_image_boxes_and_masks_together() -> None:
    source = ShapesSource(num_images=6, seed=3)
    plain, flipped = training_set(source), training_set(source, flip=1.0)
    for index in range(6):
        canvas, (h, w), target, _ = plain[(0, index)]
        mirrored, _, other, _ = flipped[(0, index)]
        # bilinear sampling is symmetric up to OpenCV's fixed point
        difference = canvas[:h, :w].flip(1).int() - mirrored[:h, :w].int()
        assert difference.abs().max() <= 2
        torch.testing.assert_close(target.masks.bitmaps().flip(2), other.masks.bitmaps())
        expected = target.boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1.0])
        expected += torch.tensor([w, 0, w, 0.0])
        torch.testing.assert_close(expected, other.boxes)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crowds_are_scaled_and_mirrored_with_the_image(tmp_path: Path, flip: float) -> None:
    source = read_data_set(dataset(tmp_path / "set"), "train")
    (x, y, w, h) = next(a["bbox"] for a in source.annotations(0) if a["iscrowd"])
    canvas_height, canvas_width = training_set(source, flip=flip)[(0, 0)][1]
    info, target = source.info(0), training_set(source, flip=flip)[(0, 0)][2]
    left = info.width - x - w if flip else x
    scale_x, scale_y = canvas_width / info.width, canvas_height / info.height
    expected = [left * scale_x, y * scale_y, (left + w) * scale_x, (y + h) * scale_y]
    torch.testing.assert_close(target.crowds, torch.tensor([expected], dtype=torch.float32))


def test_batches_hold_each_image_once_and_one_orientation() -> None:
    source = ShapesSource(num_images=50, seed=1)
    data = training_set(source)
    batches = epoch_batches(data, 4, seed=5, epoch=2)
    assert sorted(index for batch in batches for _, index in batch) == list(range(50))
    assert {epoch for batch in batches for epoch, _ in batch} == {2}
    mixed = [
        batch
        for batch in batches
        if len({source.info(i).width >= source.info(i).height for _, i in batch}) > 1
    ]
    assert len(mixed) <= 1
    assert sum(len(batch) < 4 for batch in batches) <= 1
    assert epoch_batches(data, 4, seed=5, epoch=2) == batches
    assert epoch_batches(data, 4, seed=5, epoch=3) != batches


def test_loading_does_not_depend_on_workers() -> None:
    data = training_set(ShapesSource(num_images=6, seed=2), flip=0.5)
    batches = epoch_batches(data, 3, seed=0, epoch=0)
    alone, helped = (loaded(data, batches, workers=n) for n in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        torch.testing.assert_close(a.images, b.images)
        assert a.image_ids == b.image_ids
        for x, y in zip(a.targets, b.targets, strict=True):
            torch.testing.assert_close(x.boxes, y.boxes)


def test_written_set_reads_back(tmp_path: Path) -> None:
    source = ShapesSource(num_images=5, seed=11)
    write_coco(source, tmp_path / "set")
    back = read_data_set(tmp_path / "set", "val")
    assert back.categories == source.categories
    for index in range(5):
        assert back.info(index) == source.info(index)
        np.testing.assert_array_equal(back.image(index), source.image(index))
        assert back.annotations(index) == source.annotations(index)
    with pytest.raises(DataError, match="holds a data set already"):
        write_coco(source, tmp_path / "set")


def test_real_coco_masks_have_the_annotated_area(shared_data: Path) -> None:
    source = read_data_set(shared_data / "coco_dev", "val")
    assert len(source) == 60
    assert len(source.categories) == 80
    assert source.image(0).shape == (source.info(0).height, source.info(0).width, 3)
    ratios = []
    for index in range(len(source)):
        info = source.info(index)
        for annotation in source.annotations(index):
            mask = read_segmentation(annotation["segmentation"], info.height, info.width).bitmap()
            ratios.append(mask.sum() / annotation["area"])
    assert len(ratios) == 526
    assert 0.98 < np.median(ratios) < 1.02


def test_errors_name_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set found; expected a COCO file"):
        read_data_set(tmp_path, "train")
    folder = dataset(tmp_path / "set")
    (folder / "images" / "1.png").unlink()
    with pytest.raises(ImageError, match=r"1\.png"):
        read_data_set(folder, "train").image(0)
    Image.new("RGB", (5, 5)).save(folder / "images" / "2.png")
    with pytest.raises(ImageError, match="its annotation says 12x20"):
        read_data_set(folder, "train").image(1)
    for text, words in [("{", "not a readable JSON"), ("{}", "not COCO instances"), ("[]", "COCO")]:
        (folder / "annotations" / "instances.json").write_text(text)
        with pytest.raises(DataError, match=words):
            read_data_set(folder, "train")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"images": [{"id": 7, "file_name": "1.png", "width": 20}]},
            r"no height \(int\) in {'file_",
        ),
        ({"images": [{"id": None, "file_name": "1.png"}]}, r"no id \(int or str\)"),
        ({"categories": []}, "its categories are empty: expected one object"),
        ({"images": None}, r"no images \(list\)"),
        ({"annotations": [3]}, "annotations that are JSON objects"),
        ({"categories": [{"id": 3}]}, r"no name \(str\)"),
        ({"categories": [{"id": 3, "name": "car"}, {"id": 3, "name": "bus"}]}, r"3 \(car\) and 3"),
        (
            {"categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "car"}]},
            r"3 \(car\) and 90 \(car\) share an id or a name; give each its own",
        ),
    ],
)
def test_what_is_not_coco_is_an_error(tmp_path: Path, changes: Any, words: str) -> None:
    folder = dataset(tmp_path / "set", **changes)
    with pytest.raises(DataError, match=words) as caught:
        read_data_set(folder, "train")
    assert str(caught.value).startswith(str(folder / "annotations" / "instances.json"))


def test_what_can_be_left_out_is_read(tmp_path: Path) -> None:
    one = {"id": 7, "file_name": "1.png", "width": 20.0, "height": -1}
    annotations = [{"image_id": 7}, {"image_id": 8}, {"image_id": [7]}, {}]
    folder = dataset(tmp_path / "set", images=[one, one], annotations=annotations)
    source = read_data_set(folder, "train")
    assert len(source) == 2
    assert (source.info(1).width, source.info(1).height) == (20, -1)
    assert source.annotations(1) == annotations[:1]
    assert source.stray_annotations == annotations[1:]


def broken_training_set(folder: Path, broken: set[int]) -> TrainingSet:
    """Five noisy images, of which some are cut after their header; the set leaves out image 0."""
    source = ShapesSource(num_images=5, seed=4)
    write_coco(source, folder)
    for index in broken:
        path = folder / "images" / source.info(index).file_name
        path.write_bytes(path.read_bytes()[:3000])
        with Image.open(path) as image:
            assert image.size == (source.info(index).width, source.info(index).height)
    size = PreprocessConfig(short_side=24, max_side=40)
    return TrainingSet(
        read_data_set(folder, "train"),
        [1, 2, 3, 4],
        size,
        config=DataConfig(flip_probability=0.5),
        seed=0,
    )


def test_a_truncated_image_is_replaced_by_the_next_and_reported_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = broken_training_set(tmp_path / "set", {2, 4})
    for epoch in range(4):
        for broken, used in [(2, 3), (4, 1)]:  # the latter wraps round, past what is not in the set
            canvas, size, target, image_id = data[(epoch, broken)]
            expected = data[(epoch, used)]
            assert (size, image_id, target.seed) == (*expected[1::2], expected[2].seed)
            torch.testing.assert_close(canvas, expected[0])
            torch.testing.assert_close(target.boxes, expected[2].boxes)
            torch.testing.assert_close(target.masks.bitmaps(), expected[2].masks.bitmaps())
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ["000003.png", "000005.png"], strict=True):
        assert line.startswith(f"warning: {tmp_path / 'set' / 'images' / name}: cannot be decoded")
        assert line.endswith("; training without it")


def test_a_truncated_image_does_not_end_a_worker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = broken_training_set(tmp_path / "set", {2})
    batches = [[(0, 1), (0, 2)], [(1, 2), (1, 3)]]
    ids = [batch.image_ids for batch in loaded(data, batches, workers=1)]
    assert ids == [[2, 4], [4, 4]]
    assert capfd.readouterr().err.count("training without it") == 1


def test_no_decodable_image_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = broken_training_set(tmp_path / "set", {1, 2, 3, 4})
    with pytest.raises(ImageError, match=r"000004\.png: cannot be decoded"):
        data[(0, 3)]
    assert capfd.readouterr().err == ""
