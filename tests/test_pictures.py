"""Grids of ground truth beside predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import CATEGORIES
from numpy.typing import NDArray
from PIL import Image

from comask.data.shapes import ShapesSource
from comask.data.source import ImageInfo
from comask.segmentation import read_segmentation
from comask.structures import Detections
from comask.training.figures import picture_grid, true_detections


class OneImage:
    """A source of one gray image, of any size and annotations."""

    categories = CATEGORIES

    def __init__(self, height: int, width: int, name: str, *annotations: dict[str, Any]) -> None:
        self._info = ImageInfo(id=7, file_name=name, height=height, width=width)
        self._annotations = list(annotations)

    def __len__(self) -> int:
        return 1

    def info(self, index: int) -> ImageInfo:
        return self._info

    def image(self, index: int) -> NDArray[np.uint8]:
        return np.full((self._info.height, self._info.width, 3), 128, np.uint8)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        return self._annotations


def annotation(*bbox: float, crowd: int = 0) -> dict[str, Any]:
    x, y, w, h = bbox
    outline = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {"bbox": list(bbox), "category_id": 3, "iscrowd": crowd, "segmentation": [outline]}


def nothing(height: int, width: int) -> Detections:
    return true_detections(OneImage(height, width, "x"), 0)


def test_true_masks_are_the_annotated_ones() -> None:
    source, large = ShapesSource(num_images=40, seed=5), 0
    for index in range(len(source)):
        info = source.info(index)
        objects = [a for a in source.annotations(index) if not a["iscrowd"]]
        found = true_detections(source, index)
        assert [source.categories[label].id for label in found.labels] == [
            a["category_id"] for a in objects
        ]
        for entry, mask in zip(objects, found.masks, strict=True):
            truth = read_segmentation(entry["segmentation"], info.height, info.width).bitmap()
            iou = (mask & truth).sum() / (mask | truth).sum()
            if max(entry["bbox"][2:]) > 20:
                large += 1
                assert iou > 0.9, (index, entry["id"])
    assert large > 40


def test_true_boxes_keep_to_the_image() -> None:
    source = OneImage(
        400, 600, "x",
        annotation(-10.5, 20.25, 500, 300), annotation(590, 390, 50, 50),
        annotation(10, 10, 0, 5), annotation(700, 10, 5, 5), annotation(1, 1, 9, 9, crowd=1),
    )  # fmt: skip
    found = true_detections(source, 0)
    assert found.boxes_xyxy.tolist() == [[0, 20, 490, 321], [590, 390, 600, 400]]
    assert found.labels.tolist() == [2, 2]
    assert found.masks[0].sum() == pytest.approx(489.5 * 300, rel=0.02)


def test_grid_of_shapes(tmp_path: Path) -> None:
    source = ShapesSource(num_images=40, seed=3)
    empty = next(i for i in range(40) if not source.annotations(i))
    indices = [0, 1, empty, 2, 3]
    found = [true_detections(source, i) for i in indices]
    found[0] = found[0][:0]  # nothing found where there is something
    path = tmp_path / "grid.png"
    picture_grid(source, indices, found, path)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 2 * (2 * (384 + 8) + 8)  # two pairs of 96 or 128 pixels, enlarged
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000

    # The same objects look the same but for the scores; weak predictions are not drawn.
    def pair(scores: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        again = dataclasses.replace(found[1], scores=np.full_like(found[1].scores, scores))
        picture_grid(source, [1], [again], path, threshold=0.5)
        sides = np.asarray(Image.open(path))[48:]
        return sides[:, 8 : 8 + 384], sides[:, 400 : 400 + 384]

    true, predicted = pair(1.0)
    same = (true == predicted).all(axis=2).mean()
    assert 0.95 < same < 1
    true, predicted = pair(0.49)
    assert (true == predicted).all(axis=2).mean() < 0.9


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [(480, 640, (480, 640)), (900, 1600, (360, 640)), (2000, 500, (640, 160)), (1, 1, (320, 320)),
     (300, 319, (600, 638)), (600, 100, (600, 100)), (3000, 2, (640, 1))],
)  # fmt: skip
def test_tiles_fit(tmp_path: Path, height: int, width: int, tile: tuple[int, int]) -> None:
    name = "a very long name / of an image\n" * 20
    source = OneImage(height, width, name, annotation(0, 0, width, height))
    picture_grid(source, [0], [nothing(height, width)], tmp_path / "grid.png")
    image = Image.open(tmp_path / "grid.png")
    assert image.size == (2 * (tile[1] + 8) + 8, 2 * 24 + tile[0] + 8)


def test_no_images_give_no_grid(tmp_path: Path) -> None:
    picture_grid(ShapesSource(num_images=1, seed=0), [], [], tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="shorter"):
        picture_grid(ShapesSource(num_images=1, seed=0), [0], [], tmp_path / "grid.png")
