"""What `--data` reads: the same data set in every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from conftest import MICRO, run, settings
from exports import (
    CLASSES,
    IMAGES,
    VALIDATION,
    VOC_CLASSES,
    Export,
    expected,
    found,
    opened,
    write_yaml,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comask.data.layouts import read_data_set
from comask.data.source import InstanceSource
from comask.errors import DataError

# (how it is written, whether it has a part for validation)
FORMATS: dict[str, tuple[Export, bool]] = {
    "a JSON file with images": (exports.json_file, False),
    "COCO 2017": (exports.coco2017, True),
    "Roboflow's COCO": (exports.roboflow, True),
    "CVAT's COCO": (exports.cvat, False),
    "CVAT's COCO with subsets": (exports.cvat_subsets, True),
    "YOLO": (exports.yolo, True),
    "Roboflow's YOLO": (exports.yolo_roboflow, True),
    "VOC": (exports.voc, True),
    "CVAT's masks": (exports.cvat_masks, False),
    "LabelMe": (exports.labelme, False),
    "LabelMe in parts": (exports.labelme_parted, True),
}
PICTURES = ("VOC", "CVAT's masks")  # which hold disjoint masks


@pytest.fixture(scope="module", params=FORMATS)
def exported(
    request: pytest.FixtureRequest, coco: Path, coco_disjoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path, Path]:  # fmt: skip
    """A format's name, the folder, and the same set in COCO's form."""
    origin = coco_disjoint if request.param in PICTURES else coco
    folder = tmp_path_factory.mktemp("exported") / "my set"
    folder.mkdir()
    FORMATS[request.param][0](origin, folder)
    if request.param == "a JSON file with images":
        folder /= "result.json"
    return request.param, folder, origin


def test_every_format_holds_what_coco_holds(exported: tuple[str, Path, Path]) -> None:
    name, folder, origin = exported
    classes = VOC_CLASSES if name == "VOC" else CLASSES
    whole = expected(origin, classes)
    assert len(whole) == IMAGES
    assert sum(map(len, whole.values())) > IMAGES
    train, lines = opened(folder)
    assert lines == []
    names = {category.name for category in train.categories}
    assert len(names) == 20 if name == "VOC" else names - {"bolts"} == set(classes)
    val, lines = opened(folder, "val")
    assert lines == []
    if FORMATS[name][1]:
        assert (len(train), len(val)) == (IMAGES - VALIDATION, VALIDATION)
        assert found(train) | found(val) == whole
    else:
        assert found(train) == found(val) == whole


def test_every_format_is_checked_and_trained_by_one_command(
    exported: tuple[str, Path, Path], tmp_path: Path
) -> None:
    _, folder, _ = exported
    checked = run("check", folder)
    assert checked.exit_code == 0, checked.output
    assert "the whole data set is used" in checked.output
    trained = run(
        "train", "--data", folder, "--preset", "shapes-tiny", "--output", tmp_path / "run",
        *settings(*MICRO, "train.max_steps=1", "train.evaluate_every=0", "data.val_fraction=0.2"),
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    # the part for it, or a fifth of eight images
    assert f"{IMAGES - VALIDATION} training images, {VALIDATION} for validation" in trained.output
    assert (tmp_path / "run" / "checkpoint-last.pt").exists()


# What files may look like


def test_a_json_file_names_its_image_folder(coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco / "images", tmp_path / "pictures")
    shutil.copy(coco / "annotations" / "instances.json", tmp_path / "a.json")
    with pytest.raises(DataError, match=r"a\.json: its images were not found: .*a\.json:IMAGES"):
        opened(tmp_path / "a.json")
    source, lines = opened(Path(f"{tmp_path}/a.json:{tmp_path}/pictures"))
    assert (found(source), lines) == (expected(coco), [])


def test_images_that_are_not_there_are_left_out_of_a_json_file(coco: Path, tmp_path: Path) -> None:
    exports.json_file(coco, tmp_path)
    content = exports.content_of(coco)
    content["images"][0]["file_name"] = "x" * 300  # longer than a file system allows
    content["images"][1]["file_name"] = "../../etc/passwd"
    (tmp_path / "result.json").write_text(json.dumps(content))
    source, lines = opened(tmp_path / "result.json")
    assert len(source) == IMAGES - 2
    assert [line.partition(" (")[0] for line in lines] == [
        "data: 1 image with a file_name that leads out of their folder",
        "data: 1 image with an unreadable header",
    ]


def test_linked_folders_are_read(coco: Path, tmp_path: Path) -> None:
    exports.yolo(coco, tmp_path / "set")
    images = tmp_path / "set" / "images"
    (tmp_path / "elsewhere").mkdir()
    (images / "train").rename(tmp_path / "elsewhere" / "train")
    (images / "train").symlink_to(tmp_path / "elsewhere" / "train")
    (images / "valid" / "loop").symlink_to(images)
    source, lines = opened(tmp_path / "set")
    assert (len(source), lines) == (IMAGES - VALIDATION, [])
    assert len(opened(tmp_path / "set", "val")[0]) == IMAGES  # the loop leads to the others


@pytest.mark.parametrize("names", [
    [*CLASSES], dict(enumerate(CLASSES)), {str(i): name for i, name in enumerate(CLASSES)},
])  # fmt: skip
def test_yolo_names_are_a_list_or_a_mapping(coco: Path, tmp_path: Path, names: Any) -> None:
    exports.yolo(coco, tmp_path, names)
    assert tuple(c.name for c in opened(tmp_path)[0].categories) == CLASSES
    # unquoted, YAML's own readers take it for a Boolean
    text = "names: [bolt, nut, no]\ntrain: images/train\n"
    (tmp_path / "data.yaml").write_text(text)
    assert opened(tmp_path)[0].categories[2].name == "no"


def test_yolo_lists_and_suffixes_in_capitals(coco: Path, tmp_path: Path) -> None:
    exports.yolo(coco, tmp_path)
    (file, *_) = sorted((tmp_path / "images" / "train").iterdir())
    file.rename(file.with_suffix(".PNG"))
    (tmp_path / "images" / "train" / "._a.png").write_bytes(b"macOS")
    assert found(opened(tmp_path)[0]) | found(opened(tmp_path, "val")[0]) == expected(coco)
    listed = [
        f"./images/train/{f.name}" for f in sorted((tmp_path / "images" / "train").glob("[!.]*"))
    ]
    listed[1] = str(tmp_path / listed[1])
    (tmp_path / "train.txt").write_text("\ufeff" + "\r\n".join(listed), encoding="utf-8")
    write_yaml(tmp_path, train="train.txt", val=["images/valid"])
    source, lines = opened(tmp_path)
    assert (len(source), lines) == (IMAGES - VALIDATION, [])
    write_yaml(tmp_path, train=["images/train", "images/valid"], val="null")
    assert found(opened(tmp_path)[0]) == expected(coco)


def test_voc_without_lists_and_in_its_archive(coco_disjoint: Path, tmp_path: Path) -> None:
    exports.voc(coco_disjoint, tmp_path / "VOCdevkit" / "VOC2012")
    shutil.rmtree(tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets")
    whole = expected(coco_disjoint, VOC_CLASSES)
    with_objects = {name: objects for name, objects in whole.items() if objects}
    assert found(opened(tmp_path)[0]) == with_objects  # without a list, those that have pictures


def test_labelme_shapes(coco: Path, tmp_path: Path) -> None:
    content = exports.content_of(coco)
    image = content["images"][0]
    height, width = image["height"], image["width"]
    (tmp_path / "images").mkdir()
    (tmp_path / "labels" / "a").mkdir(parents=True)
    shutil.copy(coco / "images" / image["file_name"], tmp_path / "images" / "ä.png")
    square = np.ones((7, 9), bool)
    square[2:4, 3:5] = False  # a hole
    shape = exports.labelme_shape
    shapes = [
        shape("box", [30, 40, 10, 20], "rectangle"),
        shape("disc", [50, 50, 50, 60], "circle"),
        shape("turned", [20, 50, 30, 60, 20, 70, 10, 60], "oriented_rectangle"),
        shape("brush", [5, 6, 13, 12], "mask", mask=exports.png_text(square)),
        shape("two", [0, 0, 9, 0, 9, 9], group_id=4),
        shape("two", [70, 70, 79, 70, 79, 79], group_id=4),
        shape("two", [40, 70, 49, 70, 49, 79], None),  # as old versions write it
        shape("__ignore__", [0, 0, 9, 0, 9, 9]),
    ]
    exports.labelme_file(tmp_path / "labels" / "a", image, shapes, "..\\..\\images\\ä.png")
    source, lines = opened(tmp_path)
    assert lines == []
    objects: dict[str, list[Any]] = {}
    names = {category.id: category.name for category in source.categories}
    for entry in source.annotations(0):
        mask = exports.mask_of(entry, image)
        objects.setdefault(names[entry["category_id"]], []).append((entry["bbox"], mask))
    assert set(objects) == {"box", "disc", "turned", "brush", "two"}
    whole = np.zeros((height, width), bool)
    whole[20:40, 10:30] = True
    assert (objects["box"][0][1] == whole).all()
    assert objects["box"][0][0] == [10, 20, 20, 20]
    assert objects["turned"][0][0] == [10, 50, 20, 20]
    assert objects["disc"][0][0] == pytest.approx([40, 40, 20, 20])
    assert objects["disc"][0][1].sum() == pytest.approx(np.pi * 100, rel=0.02)
    whole[:] = False
    whole[6:13, 5:14] = square
    assert (objects["brush"][0][1] == whole).all()
    assert [box for box, _ in objects["two"]] == [[0, 0, 79, 79], [40, 70, 9, 9]]


def test_names_in_another_unicode_form_are_found(
    coco: Path, coco_disjoint: Path, tmp_path: Path
) -> None:
    """macOS decomposes an umlaut: the list has one character, the disk two."""
    whole = expected(coco_disjoint, VOC_CLASSES)
    exports.voc(coco_disjoint, tmp_path / "voc")
    exports.labelme(coco, tmp_path / "labelme")
    for file in [*tmp_path.rglob("*.png")]:
        file.rename(file.with_name(file.name.replace("ü", "u\u0308")))
    for folder, truth in (("voc", whole), ("labelme", expected(coco))):
        for split in ("train", "val"):
            source, lines = opened(tmp_path / folder, split)
            assert lines == []
            assert {name: truth[name] for name in found_composed(source)} == found_composed(source)


def found_composed(source: InstanceSource) -> dict[str, list[Any]]:
    return {name.replace("u\u0308", "ü"): objects for name, objects in found(source).items()}


POLYGONS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=12)


@given(
    st.lists(st.tuples(st.integers(0, 2), POLYGONS), max_size=4),
    st.integers(8, 300),
    st.integers(8, 300),
)
def test_yolo_polygons_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    objects: list[tuple[int, list[tuple[float, float]]]], width: int, height: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("yolo")
    Image.new("L", (width, height)).save(folder / "a.png")
    lines = [f"{c} " + " ".join(f"{x!r} {y!r}" for x, y in polygon) for c, polygon in objects]
    (folder / "a.txt").write_text("\n".join(lines))
    write_yaml(folder, train=".")
    source = read_data_set(folder, "train")
    assert source.unreadable == ()
    assert [a["category_id"] for a in source.annotations(0)] == [c for c, _ in objects]
    for annotation, (_, polygon) in zip(source.annotations(0), objects, strict=True):
        points = np.reshape(annotation["segmentation"][0], (-1, 2)) / (width, height)
        assert points == pytest.approx(np.array(polygon), abs=1e-12)
        x, y, w, h = annotation["bbox"]
        assert (x, y) == pytest.approx(np.min(polygon, axis=0) * (width, height))
        assert (x + w, y + h) == pytest.approx(np.max(polygon, axis=0) * (width, height))
