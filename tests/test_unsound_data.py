"""Data sets that are not right, by whole commands: told, counted, the rest used by all in one way."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import MICRO, run, settings
from data_sets import Change, Content, cut_off, edit, exact_results, shapes_set

from comask.calib.sampling import choose_images
from comask.config import DataConfig
from comask.data.open_data import open_source, open_training_data
from comask.errors import DataError
from comask.evaluate import score


def each(**values: Any) -> Change:
    """Gives all annotations these fields."""

    def change(content: Content) -> None:
        for annotation in content["annotations"]:
            annotation.update(values)

    return change


def first(**values: Any) -> Change:
    """Gives the first annotation of the second image these fields."""

    def change(content: Content) -> None:
        second = content["images"][1]["id"]
        next(a for a in content["annotations"] if a["image_id"] == second).update(values)

    return change


def text_categories(content: Content) -> None:
    for annotation in content["annotations"]:
        annotation["category_id"] = str(annotation["category_id"])


def text_images(content: Content) -> None:
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])


def none(content: Content) -> None:
    content["annotations"] = []


NOTHING_TO_LEARN = {
    "crowds": (each(iscrowd=1), "annotations marked as crowds by iscrowd 1; crowds are not learnt"),
    "no masks": (each(segmentation=None), "annotations without segmentation; CoMask learns masks"),
    "empty masks": (each(segmentation=[]), "annotations without segmentation; CoMask learns masks"),
    "text categories": (
        text_categories,
        "annotations of unknown categories; give annotations the id",
    ),
    "text images": (
        text_images,
        "annotations of unknown images; give annotations the id of an image",
    ),
    "text crowds": (each(iscrowd="0"), "with an iscrowd other than 0 and 1; iscrowd is 0 for one"),
    "no boxes": (
        each(bbox=None),
        "annotations without bbox or category_id; give annotations a bbox",
    ),
    "flat boxes": (each(bbox=[1, 1, 0, 0]), "boxes without area; a bbox is [x, y, width, height]"),
    "no annotations": (none, "they have no annotations"),
}


@pytest.mark.parametrize("kind", NOTHING_TO_LEARN)
def test_nothing_to_learn_is_refused_with_the_reason_and_the_remedy(
    kind: str, tmp_path: Path
) -> None:
    change, words = NOTHING_TO_LEARN[kind]
    data = shapes_set(tmp_path / "set", change)
    result = run(
        "train", "--data", data, "--val", data, "--preset", "shapes-tiny",
        "--output", tmp_path / "run", *settings(*MICRO),
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("error:"))
    assert f"--data {data}: no object to learn from in 4 training images: " in line
    assert words in line
    assert not (tmp_path / "run").exists()


def test_a_set_without_classes_is_refused(tmp_path: Path) -> None:
    data = shapes_set(tmp_path / "set", lambda content: content.update(categories=[]))
    result = run("train", "--data", data, "--preset", "shapes-tiny", "--output", tmp_path / "run")
    assert result.exit_code == 1
    assert f"{data / 'annotations' / 'instances.json'}: its categories are empty" in result.output


def test_objects_set_aside_are_not_learnt_from(tmp_path: Path) -> None:
    """Where all objects are in the images that validate, the reason is another one."""

    def one(content: Content) -> None:
        content["annotations"] = content["annotations"][:1]

    data = shapes_set(tmp_path / "set", one)
    said = set()
    for seed in range(50):
        try:
            open_training_data(DataConfig(), str(data), None, seed)
        except DataError as error:
            said.add(str(error))
    (message,) = said  # in some seeds the one image with objects trains
    assert "all objects are in the part set aside for validation; name others with --val" in message


def test_mostly_crowds_are_warned_of(tmp_path: Path) -> None:
    def most(content: Content) -> None:
        for annotation in content["annotations"][1:]:
            annotation["iscrowd"] = 1

    data = shapes_set(tmp_path / "set", most)
    lines: list[str] = []
    open_source(str(data), "train", shapes_images=0, shapes_seed=0, report=lines.append)
    count = (
        len(json.loads((data / "annotations" / "instances.json").read_text())["annotations"]) - 1
    )
    assert lines[0].startswith(
        f"data: {count} annotations marked as crowds by iscrowd 1 (more than half of all; not learnt)"
    )
    edit(data, each(iscrowd=0))
    lines.clear()
    open_source(str(data), "train", shapes_images=0, shapes_seed=0, report=lines.append)
    assert lines == []


def test_classes_without_an_object_are_left_out_unless_they_are_validated(tmp_path: Path) -> None:
    def with_group(content: Content) -> None:
        content["categories"].insert(0, {"id": 99, "name": "shapes-group", "supercategory": "none"})

    data, val = (shapes_set(tmp_path / name, with_group, images=12) for name in ("a", "b"))
    result = run(
        "train", "--data", data, "--val", val, "--preset", "shapes-tiny",
        "--output", tmp_path / "run", *settings(*MICRO, "train.max_steps=1"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "data: 1 category without an object (left out): shapes-group" in result.output
    assert "12 training images, 12 for validation, 8 classes" in result.output
    edit(val, first(category_id=99))
    opened = open_training_data(DataConfig(), str(data), str(val), 0)
    assert "shapes-group" in {category.name for category in opened.train.categories}


def test_a_validation_set_without_objects_has_no_ap(tmp_path: Path) -> None:
    data, val = shapes_set(tmp_path / "a"), shapes_set(tmp_path / "b", none)
    result = run(
        "train", "--data", data, "--val", val, "--preset", "shapes-tiny",
        "--output", tmp_path / "run",
        *settings(*MICRO, "train.max_steps=2", "train.evaluate_every=1", "train.patience=1"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "AP is n/a, and the last checkpoint is kept" in result.output
    assert "segm: AP n/a  AP50 n/a" in result.output
    assert "-100" not in result.output + (tmp_path / "run" / "report.html").read_text()
    assert "stopped at step" not in result.output  # n/a is no lack of progress
    assert (tmp_path / "run" / "checkpoint-best.pt").exists()


def nested(content: Content) -> None:
    first(segmentation=[[]])(content)


def bad_rle(content: Content) -> None:
    first(segmentation={"size": [1, 1], "counts": [1]})(content)


def missing_file(content: Content) -> None:
    content["images"][1]["file_name"] = "absent.png"


def other_size(content: Content) -> None:
    content["images"][1]["width"] += 1


def listed_twice(content: Content) -> None:
    content["images"].append(content["images"][1])


def stray(content: Content) -> None:
    content["annotations"].append(content["annotations"][0] | {"id": 10**6, "image_id": 10**6})


UNSOUND: dict[str, tuple[Change, str]] = {
    "bad_rle": (bad_rle, "mask in RLE that cannot be of the image"),
    "empty_segmentation": (first(segmentation=[]), "annotation without segmentation"),
    "nested_empty": (nested, "annotation with only polygons of fewer than 3 points"),
    "no_bbox": (first(bbox=None), "annotation without bbox or category_id"),
    "outside": (first(bbox=[900, 900, 9, 9]), "box outside the image"),
    "clipped": (first(bbox=[-20, -20, 90, 90]), "box partly outside the image"),
    "unknown_category": (first(category_id=77), "annotation of unknown categories"),
    "iscrowd_text": (first(iscrowd="0"), "annotation with an iscrowd other than 0 and 1"),
    "iscrowd_null": (first(iscrowd=None), ""),
    "crowd": (first(iscrowd=1), ""),
    "area": (first(area="big"), "annotation with an area that is not a number"),
    "missing_file": (missing_file, "image without a file"),
    "other_size": (other_size, "image of another size than annotated"),
    "listed_twice": (listed_twice, "image listed again"),
    "stray": (stray, "annotation of unknown images"),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_evaluation_and_training_score_the_same_objects(
    kind: str, micro_bundle: Path, tmp_path: Path
) -> None:
    """The same AP for the same results, among which are those of objects that are left out."""
    change, words = UNSOUND[kind]
    data = shapes_set(tmp_path / "set")
    results = exact_results(open_source(str(data), "val", shapes_images=0, shapes_seed=0))
    (tmp_path / "own.json").write_text(json.dumps(results))
    edit(data, change)
    opened = open_training_data(DataConfig(), str(data), str(data), 0)
    training = score(opened.val, opened.val_indices, results)
    result = run(
        "eval", micro_bundle, "--data", data, "--backend", "onnxruntime", "--no-record",
        "--results", tmp_path / "own.json", "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert "Traceback" not in result.output
    assert (f"data: 1 {words}" if words else "data:") in result.output or not words
    ours = json.loads((tmp_path / "report.json").read_text())["backends"]["own.json"]
    for task in ("bbox", "segm"):
        assert ours[task]["AP"] == pytest.approx(100 * training.values[task]["AP"])
        assert ours[task]["AP"] > 50


def test_an_image_that_cannot_be_decoded_ends_no_command(
    micro_bundle: Path, micro_run: Path, tmp_path: Path
) -> None:
    data = shapes_set(tmp_path / "set", first(segmentation=[]), images=5)
    broken = cut_off(data)
    told = "data: 1 annotation without segmentation (left out)"

    result = run("eval", micro_bundle, "--data", data, "--no-record", "--tolerance", 100,
                 "--json", tmp_path / "eval.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert told in result.output
    assert broken.name in result.output
    assert "1 of 5 images cannot be decoded; their annotations do not count" in result.output
    report = json.loads((tmp_path / "eval.json").read_text())
    assert (report["images"], report["not_decoded"]) == (4, 1)

    result = run("sweep", micro_bundle, "--data", data, "--runs", 1,
                 "--backend", "onnxruntime", "--grid", "proposals=7")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "1 of 5 images cannot be decoded" in result.output
    assert told in result.output
    assert broken.name in result.output

    result = run("export", micro_run / "checkpoint-last.pt", "--output", tmp_path / "bundle",
                 "--data", data, "--limit", 5)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert told in result.output
    assert broken.name in result.output

    lines: list[str] = []
    chosen = choose_images(data, 5, 0, report=lines.append)
    assert len(chosen) == 4
    assert any(line.startswith(told) for line in lines)
    assert any(line.startswith("skipped:") and broken.name in line for line in lines)


NAMES = ("Grün_é.png", "한글.png", "Å.png")


@pytest.mark.parametrize("listed", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_name_in_another_unicode_form_is_found(listed: Any, stored: Any, tmp_path: Path) -> None:
    def rename(content: Content) -> None:
        for entry, name in zip(content["images"], NAMES, strict=False):
            file = tmp_path / "set" / "images" / entry["file_name"]
            file.rename(file.with_name(unicodedata.normalize(stored, name)))
            entry["file_name"] = unicodedata.normalize(listed, name)

    data = shapes_set(tmp_path / "set", rename)
    lines: list[str] = []
    source = open_source(str(data), "val", shapes_images=0, shapes_seed=0, report=lines.append)
    assert (len(source), lines) == (4, [])
    assert [source.image(i).ndim for i in range(4)] == [3] * 4


def test_boxes_from_masks_train_and_score(micro_bundle: Path, tmp_path: Path) -> None:
    """Boxes as corners are told; `data.boxes=mask` and `--boxes mask` use none of them."""
    data = shapes_set(tmp_path / "set")
    right = exact_results(
        open_source(str(data), "val", shapes_images=0, shapes_seed=0, boxes="mask")
    )
    (tmp_path / "own.json").write_text(json.dumps(right))

    def corners(content: Content) -> None:
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]

    edit(data, corners)
    found = {}
    for boxes in ("annotated", "mask"):
        result = run(
            "eval", micro_bundle, "--data", data, "--backend", "onnxruntime", "--no-record",
            "--boxes", boxes, "--results", tmp_path / "own.json", "--json", tmp_path / "r.json",
        )  # fmt: skip
        assert ("far from their masks" in result.output) == (boxes == "annotated"), result.output
        found[boxes] = json.loads((tmp_path / "r.json").read_text())["backends"]["own.json"]
    assert found["mask"]["bbox"]["AP"] == pytest.approx(100)
    assert found["annotated"]["bbox"]["AP"] < 50
    assert found["annotated"]["segm"]["AP"] == found["mask"]["segm"]["AP"] == pytest.approx(100)
    config = DataConfig(boxes="mask")
    opened = open_training_data(config, str(data), str(data), 0)
    assert score(opened.val, opened.val_indices, right).values["bbox"]["AP"] == pytest.approx(1)
