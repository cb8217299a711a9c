"""The picture grid of what training sees."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MICRO, run, settings
from numpy.typing import NDArray
from PIL import Image

from comask.config import DataConfig, PreprocessConfig
from comask.data.shapes import ShapesSource
from comask.data.source import Category, ImageInfo
from comask.data.training_set import TrainingSet
from comask.training.training_images import SHOWN, draw_training_images, true_detections

GRAY = 100


class OneObject:
    """Gray images of 64x40 pixels with an L of 20x16 pixels at (8, 6)."""

    categories = (Category(id=5, name="L"),)

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images

    def info(self, index: int) -> ImageInfo:
        return ImageInfo(id=index, file_name=f"{index}.png", height=40, width=64)

    def image(self, index: int) -> NDArray[np.uint8]:
        return np.full((40, 64, 3), GRAY, np.uint8)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        corners = [8, 6, 18, 6, 18, 14, 28, 14, 28, 22, 8, 22]
        return [
            {"id": index, "image_id": index, "category_id": 5, "bbox": [8, 6, 20, 16], "area": 240,
             "iscrowd": 0, "segmentation": [corners]}
        ]  # fmt: skip


def grid(folder: Path, images: int, **data: Any) -> NDArray[np.int16]:
    size = PreprocessConfig(short_side=40, max_side=64)
    dataset = TrainingSet(
        OneObject(images), list(range(images)), size, config=DataConfig(**data), seed=0
    )
    draw_training_images(dataset, 3, folder)
    with Image.open(folder / "training_images.jpg") as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int16)


@pytest.mark.parametrize("mirrored", [False, True])
def test_masks_and_boxes_are_drawn_where_the_objects_are(tmp_path: Path, mirrored: bool) -> None:
    """A tile shows each pixel of these images five times."""
    sheet = grid(tmp_path, 1, flip_probability=float(mirrored))
    tile = sheet[: 40 * 5, : 64 * 5]
    assert sheet.shape == (40 * 5 + 4, 64 * 5 + 4, 3)
    if mirrored:
        tile = tile[:, ::-1]

    def tinted(x: int, y: int) -> bool:
        """Whether the middle of an image's pixel is."""
        place = tile[y * 5 + 1 : y * 5 + 4, x * 5 + 1 : x * 5 + 4]
        return bool(abs(place - GRAY).max(axis=2).mean() > 12)

    inside = [(11, 9), (15, 9), (11, 19), (15, 17), (25, 17), (25, 19)]  # 3 pixels and more
    outside = [(5, 12), (31, 18), (20, 25), (23, 10), (50, 30), (15, 30)]
    assert all(tinted(x, y) for x, y in inside)
    assert not any(tinted(x, y) for x, y in outside)
    line = abs(tile - GRAY).max(axis=2) > 40
    for edge in (line[6 * 5 + 2 : 22 * 5 - 2, 28 * 5 - 1], line[6 * 5, 20 * 5 : 28 * 5]):
        assert edge.mean() > 0.9  # the box, also beside the L's gap
    assert not line[: 6 * 5 - 3, 30 * 5 :].any()


def test_a_grid_holds_the_first_images_of_the_run(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    few.mkdir()
    many.mkdir()
    height, width = 40 * 5 + 4, 64 * 5 + 4
    assert grid(few, 5).shape == (2 * height, 3 * width, 3)
    assert grid(many, SHOWN + 9).shape == (4 * height, 4 * width, 3)
    blank = grid(few, 5)[height + 5 :, 2 * width + 5 :]
    assert (blank > 250).all()  # of the sixth place


def test_drawn_masks_are_those_that_training_learns() -> None:
    config = DataConfig(turn_probability=1.0, copy_paste_probability=1.0)
    source = ShapesSource(num_images=20, seed=1)
    half = PreprocessConfig(short_side=48, max_side=64)
    data = TrainingSet(source, list(range(20)), half, config=config, seed=0)
    names = tuple(category.name for category in source.categories)
    shared, either = [], []
    for index in range(20):
        _, (h, w), target, _ = data[0, index]
        drawn = true_detections(target, (h, w), names)
        assert torch.equal(torch.from_numpy(drawn.boxes_xyxy), target.boxes)
        for place, bitmap in enumerate(target.masks.bitmaps().numpy()):
            halved = bitmap.reshape(h, 2, w, 2).mean(axis=(1, 3)) >= 0.5
            x, y, crop = drawn.crop(place)
            pasted = np.zeros((h, w), bool)
            pasted[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
            shared.append((pasted & halved).sum())
            either.append((pasted | halved).sum())
    assert len(shared) > 30
    assert sum(shared) > 0.93 * sum(either)  # pixels on the outlines may differ


def test_a_run_has_the_grid_and_its_report_shows_it(micro_run: Path) -> None:
    content = (micro_run / "training_images.jpg").read_bytes()
    page = (micro_run / "report.html").read_text()
    assert f"data:image/jpeg;base64,{base64.b64encode(content).decode()}" in page


def test_a_job_that_is_queued_with_resume_has_the_grid(tmp_path: Path) -> None:
    result = run("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run",
                 "--resume", *settings(*MICRO, "train.max_steps=1"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "training_images.jpg").exists()
