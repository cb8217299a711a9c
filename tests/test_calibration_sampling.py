"""Which images calibrate: every kind is there, the same ones each time, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from comask.calib.sampling import CalibrationImage, choose_images
from comask.data.shapes import ShapesSource
from comask.data.source import Category, ImageInfo
from comask.errors import CalibrationError


class Listed:
    """A source that needs no files: image i has objects of the listed classes and side."""

    def __init__(self, objects: list[list[tuple[int, int]]]) -> None:
        count = 1 + max((label for image in objects for label, _ in image), default=0)
        self.categories = tuple(Category(id=10 * i, name=f"c{i}") for i in range(count))
        self._objects = objects

    def __len__(self) -> int:
        return len(self._objects)

    def info(self, index: int) -> ImageInfo:
        return ImageInfo(id=index, file_name=f"{index}.png", height=10, width=10)

    def image(self, index: int) -> NDArray[np.uint8]:
        return np.full((10, 10, 3), (index // 256, index % 256, 0), np.uint8)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        return [
            {"category_id": 10 * label, "bbox": [0, 0, side, side], "area": side**2}
            for label, side in self._objects[index]
        ]


def names(images: list[CalibrationImage]) -> list[str]:
    return [image.name for image in images]


def silent(line: str) -> None:
    raise AssertionError(f"nothing was to be reported: {line}")


objects = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 200)), max_size=4), min_size=1, max_size=30
)


@given(objects, st.integers(0, 5), st.data())
def test_the_same_again_and_more_begin_with_the_fewer(
    listed: list[list[tuple[int, int]]], seed: int, data: st.DataObject
) -> None:
    source = Listed(listed)
    everything = names(choose_images(source, len(listed), seed, report=silent))
    assert sorted(everything) == sorted(f"{i}.png" for i in range(len(listed)))
    count = data.draw(st.integers(1, len(listed)))
    assert names(choose_images(source, count, seed, report=silent)) == everything[:count]


@pytest.mark.parametrize("seed", range(5))
def test_rare_classes_and_sizes_are_there(seed: int) -> None:
    """Of 1000 images 997 hold class 0 at medium size; at random, 16 would hardly hold the others."""
    listed = [[(0, 50)]] * 997 + [[(1, 50)], [(0, 5), (2, 150)], []]
    found = names(choose_images(Listed(listed), 16, seed, report=silent))
    assert {"997.png", "998.png", "999.png"} <= set(found)


def test_seeds_choose_other_images() -> None:
    source = Listed([[(0, 50)]] * 100)
    chosen = {tuple(names(choose_images(source, 5, seed, report=silent))) for seed in range(4)}
    assert len(chosen) == 4


def test_an_image_is_decoded_again_and_known_by_its_pixels() -> None:
    source = ShapesSource(num_images=6, seed=3)
    chosen = choose_images(source, 6, 0, report=silent)
    for image in chosen:
        index = int(Path(image.name).stem) - 1
        np.testing.assert_array_equal(image.decode(), source.image(index))
    assert len({image.sha256 for image in chosen}) == 6


def save(path: Path, height: int, width: int, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path, exif=exif)


def test_a_plain_folder_gives_every_shape(tmp_path: Path) -> None:
    for i in range(40):
        save(tmp_path / f"wide{i}.jpg", 60, 80 + i)
    save(tmp_path / "tall.png", 80, 60)
    save(tmp_path / "turned.jpg", 60, 81, orientation=6)  # a phone's
    save(tmp_path / "square.jpg", 60, 60)
    save(tmp_path / "large.jpg", 600, 800)
    (tmp_path / "notes.txt").write_text("not an image")
    found = set(names(choose_images(tmp_path, 8, 0, report=silent)))
    assert {"tall.png", "square.jpg", "large.jpg", "turned.jpg"} <= found


def test_what_cannot_be_read_is_told_and_replaced(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.jpg", 60 + i, 80)
    shutil.copy(tmp_path / "1.jpg", tmp_path / "copy.jpg")
    (tmp_path / "empty.jpg").touch()
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) - 40])
    lines: list[str] = []
    found = choose_images(tmp_path, 4, 0, report=lines.append)
    assert sorted(name.replace("copy", "1") for name in names(found)) == ["0.jpg", "1.jpg", "2.jpg"]
    skipped = sorted(line for line in lines if line.startswith("skipped: "))
    assert len(skipped) == 2
    assert f"{tmp_path}/cut.jpg" in skipped[0]
    assert f"{tmp_path}/empty.jpg" in skipped[1]
    assert set(lines) - set(skipped) == {
        "calibration: 3 images instead of 4: the data has 6, of which 2 cannot be read; copies count "
        "once"
    }


def test_real_data_sets_are_found_in_their_folder(shared_data: Path) -> None:
    lines: list[str] = []
    found = choose_images(shared_data / "coco_dev", 12, 0, report=lines.append)
    assert len(set(names(found))) == 12
    shapes = {image.decode().shape[0] > image.decode().shape[1] for image in found}
    assert shapes == {True, False}


@pytest.mark.parametrize(
    ("content", "match"), [("nothing", "no images"), ("broken", "none of"), ("absent", "listed")]
)
def test_no_data_is_refused(tmp_path: Path, content: str, match: str) -> None:
    folder = tmp_path / "images"
    if content != "absent":
        folder.mkdir()
    if content == "broken":
        (folder / "a.jpg").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match=match):
        choose_images(folder, 4, 0, report=lambda line: None)


def test_a_count_of_none_is_refused() -> None:
    with pytest.raises(CalibrationError, match="expected at least 1"):
        choose_images(Listed([[(0, 5)]]), 0, 0, report=silent)
