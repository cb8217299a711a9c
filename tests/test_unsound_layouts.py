"""What is wrong with a file of an annotation tool is one counted line, and the rest is used."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from exports import (
    IMAGES,
    VALIDATION,
    Content,
    Export,
    expected,
    found,
    opened,
    write_yaml,
)
from PIL import Image

from comask.errors import DataError

Change = Callable[[Path], object]
NAME = "clip 1 für 001"  # the first image


def text(number: int, line: str) -> Change:
    """Replaces the first line of an image's labels."""

    def change(folder: Path) -> None:
        file = next((folder / "labels" / "train").glob(f"*{number:03}.txt"))
        file.write_text("\n".join([line, *file.read_text().splitlines()[1:]]))

    return change


def labels(folder: Path) -> Path:
    return folder / "labels" / "train" / f"{NAME}.txt"


def instead(make: Change) -> Change:
    """Makes something else in place of the first image's labels."""

    def change(folder: Path) -> None:
        labels(folder).unlink()
        make(labels(folder))

    return change


def listed(line: str) -> Change:
    def change(folder: Path) -> None:
        files = sorted((folder / "images" / "train").iterdir())
        (folder / "l.txt").write_text("\n".join([line, *map(str, files)]))
        write_yaml(folder, train="l.txt", val="images/valid")

    return change


UNREAD = r"1 annotation that cannot be read \(left out\)"
BAD_YOLO: dict[str, tuple[Change, str]] = {
    "a word": (text(1, "bolt 0.1 0.1 0.2 0.2 0.3 0.1"), UNREAD + r".*001\.txt line 1: expected the"),
    "nan": (text(1, "0 nan 0.1 0.2 0.2 0.3 0.1"), UNREAD + r".*expected the number of a class and coord"),
    "an infinite class": (text(1, "1e999 0.1 0.1 0.2 0.2 0.3 0.1"), UNREAD),
    "half a class": (text(1, "0.5 0.1 0.1 0.2 0.2 0.3 0.1"), UNREAD),
    "no coordinates": (text(1, "0"), UNREAD + ".*at least 3 points, found 0 numbers"),
    "one point": (text(1, "0 0.1 0.1"), UNREAD),
    "an odd number": (text(1, "0 0.1 0.1 0.2 0.2 0.3"), UNREAD + ".*found 5 numbers"),
    "a box": (text(1, "0 0.5 0.5 0.2 0.2"), r"1 annotation without segmentation \(left out\)"),
    "an unknown class": (text(1, "77 0.1 0.1 0.2 0.2 0.3 0.1"), "1 annotation of unknown categories"),
    "pixels": (text(1, "0 10 10 20 20 30 10"), "1 mask without a pixel"),
    "not UTF-8": (lambda folder: labels(folder).write_bytes(b"0 \xff\xfe"),
                  UNREAD + r".*001\.txt: not a readable text in UTF-8.*the image .*001\.png is left out"),
    "a folder": (instead(lambda file: file.mkdir()),
                 UNREAD + ".*not a file"),
    "a link to nothing": (instead(lambda file: file.symlink_to("no")),
                          UNREAD + ".*not a file"),
    "a broken image": (
        lambda folder: (folder / "images" / "train" / f"{NAME}.png").write_bytes(b"no image"),
        "1 image with an unreadable header",
    ),
    "a file of the machine": (listed("/etc/hostname"), "1 image with a file_name that leads out"),
    "a way out": (listed("../../secret.png"), "1 image with a file_name that leads out"),
    "a missing file": (listed("images/train/no.png"), "1 image without a file"),
    "a file twice": (listed(f"./images/train/{NAME}.png"), "1 image listed again"),
    "a name too long": (listed("y" * 300 + ".png"), "1 image with an unreadable header"),
}  # fmt: skip


def png(kind: str) -> Callable[[Path], Path]:
    return lambda folder: folder / kind / f"{NAME}.png"


def repaint(kind: str, colour: tuple[int, int, int]) -> Change:
    """Gives the first object of an image another colour."""

    def change(folder: Path) -> None:
        pixels = np.array(Image.open(png(kind)(folder)).convert("RGB"))
        first = np.array(Image.open(png("SegmentationObject")(folder)).convert("RGB")) == (
            128,
            0,
            0,
        )
        pixels[first.all(axis=2)] = colour
        Image.fromarray(pixels).save(png(kind)(folder))

    return change


def speckle(folder: Path) -> None:
    file = png("SegmentationObject")(folder)
    size = Image.open(file).size
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(file)


def first_listed(name: str) -> Change:
    def change(folder: Path) -> None:
        file = folder / "ImageSets" / "Segmentation" / "default.txt"
        file.write_text(f"{name}\r\n" + file.read_text())

    return change


BAD_VOC: dict[str, tuple[Change, str]] = {
    "a cut PNG": (
        lambda folder: png("SegmentationClass")(folder).write_bytes(
            png("SegmentationClass")(folder).read_bytes()[:150]
        ),
        UNREAD + r".*SegmentationClass/.*001\.png: not a readable PNG",
    ),
    "no PNG": (lambda folder: png("SegmentationObject")(folder).unlink(), UNREAD + ".*No such file"),
    "another size": (
        lambda folder: Image.new("P", (7, 5)).save(png("SegmentationObject")(folder)),
        UNREAD + r".*is 7x5 pixels, its image (128x96|96x128)",
    ),
    "a claim to be huge": (
        lambda folder: png("SegmentationObject")(folder).write_bytes(huge_png()), UNREAD,
    ),
    "an unknown colour": (
        repaint("SegmentationClass", (1, 2, 3)),
        UNREAD + ".*object of colour 128,0,0 has the colour 1,2,3, which is no class's",
    ),
    "a photograph": (speckle, UNREAD + r".*has \d+ colours; expected one for each object"),
    "a way out": (first_listed("../../../etc/x"), "1 image with a file_name that leads out"),
    "a missing image": (first_listed("no such"), "1 image without a file"),
    "a name twice": (first_listed(NAME), "1 image listed again"),
}  # fmt: skip


def huge_png() -> bytes:
    """The header of a PNG with 10 thousand million pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def entry(change: Callable[[Content], object]) -> Change:
    """Changes the JSON file of the first image."""

    def applied(folder: Path) -> None:
        file = folder / f"{NAME}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return applied


def added(numbers: list[Any], kind: str = "polygon", **more: Any) -> Change:
    """Adds a shape to the first image."""
    shape = exports.labelme_shape("bolt", [], kind, points=numbers, **more)
    return entry(lambda content: content["shapes"].append(shape))


SQUARE = exports.png_text(np.ones((9, 9), bool))
BAD_LABELME: dict[str, tuple[Change, str]] = {
    "no JSON": (lambda folder: (folder / f"{NAME}.json").write_text("{"),
                UNREAD + r".*001\.json: not a readable JSON file"),
    "deep JSON": (lambda folder: (folder / f"{NAME}.json").write_text("[" * 100_000), UNREAD),
    "another JSON": (lambda folder: (folder / "z.json").write_text("[1]"), UNREAD + ".*LabelMe's, which"),
    "no list": (entry(lambda content: content.update(shapes=3)), UNREAD + ".*no list of shapes"),
    "no label": (entry(lambda content: content["shapes"].append({})), UNREAD + ".*shape without a label"),
    "no points": (added([]), UNREAD + ".*001.json shape bolt: a polygon of 0 points has no area"),
    "no pairs": (added([1, 2, 3]), UNREAD + ".*points of two numbers each"),
    "nan": (added([[float("nan"), 1], [2, 3], [4, 9]]), UNREAD + ".*not finite"),
    "a huge number": (added([[10**400, 1], [2, 3], [4, 9]]), UNREAD),
    "a line": (added([[1, 2], [3, 4]], "line"), UNREAD + ".*a line of 2 points has no area"),
    "a shape of another tool": (added([[1, 2]], "star"), UNREAD),
    "no mask": (added([[1, 2], [9, 9]], "mask"), UNREAD + ".*its mask cannot be read"),
    "no base64": (added([[1, 2], [9, 9]], "mask", mask="~"), UNREAD),
    "no PNG": (added([[1, 2], [9, 9]], "mask", mask="aGFsbG8="), UNREAD),
    "beyond": (added([[90, 1], [99, 9]], "mask", mask=exports.png_text(np.ones((9, 99), bool))),
               UNREAD + ".*99x9 pixels at 90,1 reach beyond the image"),
    "at infinity": (added([[float("inf"), 1], [9, 9]], "mask", mask=SQUARE), UNREAD),
    "another size": (entry(lambda content: content.update(imageWidth=7, imageHeight=5)),
                     UNREAD + r".*says 7x5, its image is (128x96|96x128) pixels"),
    "a way out": (entry(lambda content: content.update(imagePath="../../secret.png")),
                  "1 image with a file_name that leads out"),
    "a file of the machine": (entry(lambda content: content.update(imagePath="/etc/hostname")),
                              "1 image with a file_name that leads out"),
    "a missing image": (entry(lambda content: content.update(imagePath="no.png")),
                        "1 image without a file"),
    "a far polygon": (added([[900, 900], [990, 900], [990, 990]]), "1 mask without a pixel"),
}  # fmt: skip
BAD = [
    pytest.param(export, change, words, id=f"{export.__name__}-{name}")
    for export, cases in (
        (exports.yolo, BAD_YOLO), (exports.cvat_masks, BAD_VOC), (exports.labelme, BAD_LABELME)
    )
    for name, (change, words) in cases.items()
]  # fmt: skip


@pytest.mark.parametrize(("export", "change", "words"), BAD)
def test_what_is_wrong_is_one_line_and_the_rest_is_used(
    export: Export, change: Change, words: str, coco: Path, coco_disjoint: Path, tmp_path: Path
) -> None:
    origin = coco_disjoint if export is exports.cvat_masks else coco
    folder = tmp_path / "deep" / "set"  # so that a way out leads to a folder of the test
    folder.mkdir(parents=True)
    export(origin, folder)
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    change(folder)
    source, lines = opened(folder)
    assert len(lines) == 1, lines
    assert re.search(words, lines[0]), lines
    whole, rest = expected(origin), found(source)
    assert len(rest) >= IMAGES - VALIDATION - 1
    assert {name: whole[name] for name in rest if name != NAME} == {
        name: objects for name, objects in rest.items() if name != NAME
    }
    # of the image itself, everything else is there, or it is left out
    first = Counter(map(str, rest.get(NAME, [])))
    assert first <= Counter(map(str, whole[NAME]))
    assert NAME not in rest or len(whole[NAME]) - 1 <= first.total()


def test_what_makes_a_set_unusable_is_one_sentence(coco: Path, tmp_path: Path) -> None:
    def fails(words: str, folder: Path = tmp_path / "yolo", split: str = "train") -> None:
        with pytest.raises(DataError, match=words):
            opened(folder, split)

    exports.yolo(coco, tmp_path / "yolo")
    file = tmp_path / "yolo" / "data.yaml"
    for content, words in [
        ("names: [a", "not a readable YAML file"),
        ("[" * 3000, "not a readable YAML file"),
        ("", "expected the keys train, val and names; found"),
        ("names: []\ntrain: images/train", "expected `names`, a list of class names; found"),
        ("names: {a: 1}\ntrain: images/train", "expected `names`"),
        ("names: [[a], b]\ntrain: images/train", "expected `names`"),
        ("names: [a, a]\ntrain: images/train", r"data\.yaml: categories 0 \(a\) and 1 \(a\) share"),
        ("names: [a]", "names no images"),
        ("names: [a]\nval: images/valid", "has no images for train, only for val"),
        ("names: [a]\ntrain: images/no", "train names 'images/no', which is neither"),
        ("names: [a]\ntrain: /dev/zero", "which is neither a folder nor a file"),
        ("names: [a]\ntrain: labels", "which has no images"),
        ("names: [a]\ntrain: images/train\nkpt_shape: [17, 3]", "has keypoints"),
    ]:
        file.write_text(content)
        fails(words)
    fails("images: no data set found", tmp_path / "yolo" / "images")
    bomb = ["b0: &b0 [x, x]", *(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]" for i in range(1, 60))]
    file.write_text("\n".join([*bomb, "names: *b59", "train: images/train"]))
    fails("expected `names`")
    write_yaml(tmp_path / "yolo", train="images/train")
    fails("is a part of the data set .*yolo; give that folder", tmp_path / "yolo" / "images")
    shutil.rmtree(tmp_path / "yolo" / "labels")
    fails("none of the 6 images has a text file of labels; expected such as .*labels/train")

    exports.labelme_parted(coco, tmp_path / "labelme")
    fails("its images lie outside of it, such as .*images", tmp_path / "labelme" / "train")
    (tmp_path / "empty").mkdir()
    fails("empty: no data set found; expected a COCO file", tmp_path / "empty")
    fails("no such folder or file", tmp_path / ("z" * 300))
    exports.labelme_file(tmp_path / "empty", exports.content_of(coco)["images"][0], [])
    fails("LabelMe's JSON files have no shapes", tmp_path / "empty")

    exports.cvat_subsets(coco, tmp_path / "cvat")
    for old, new in (("Train", "a"), ("Validation", "b")):
        place = tmp_path / "cvat" / "annotations"
        (place / f"instances_{old}.json").rename(place / f"instances_{new}.json")
    fails("cvat: has the parts a, b, of which none is called train or val", tmp_path / "cvat")


def test_a_labelmap_that_is_none(coco_disjoint: Path, tmp_path: Path) -> None:
    exports.cvat_masks(coco_disjoint, tmp_path)
    file = tmp_path / "labelmap.txt"
    file.write_text(file.read_text().replace("bolt:", "a:b:", 1), encoding="utf-8-sig")
    assert opened(tmp_path)[0].categories[0].name == "a:b"
    for content in ("bolt\n", "bolt:1,2\n", "bolt:red\n"):
        file.write_text(content)
        with pytest.raises(DataError, match=r"labelmap\.txt: expected lines `name:red,green,blue"):
            opened(tmp_path)
