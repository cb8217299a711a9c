"""The page of `comask check`: its numbers are right, and it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run
from data_sets import cut_off, edit, shapes_set
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from comask.data.open_data import open_source
from comask.data.survey import Survey

BROWSER = Path(sys.prefix) / "chromium"  # report of install_debian.py
NAME = "<b>disc & $x^2$</b>"


class Page(HTMLParser):
    """The text of a page, its table rows, and its pictures with their captions."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.text, self.rows, self.tags = (
            path.read_text(),
            "",
            list[list[str]](),
            set[str](),
        )
        self.pictures: list[tuple[str, bytes]] = []
        self.addresses: list[str] = []
        self._cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.add(tag)
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        if tag == "tr":
            self.rows.append([])
        self._cell = tag == "td"
        if tag == "img":
            content = base64.b64decode(values["src"].partition("base64,")[2])
            self.pictures.append((values["alt"], content))

    def handle_endtag(self, tag: str) -> None:
        self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data + " "
        if self._cell:
            self.rows[-1].append(data)

    def facts(self) -> dict[str, str]:
        found = re.findall(r"<dt>(.+?)</dt><dd>(.+?)</dd>", self.source)
        return dict(found)

    def picture(self, caption: str) -> NDArray[np.int16]:
        ((_, content),) = [p for p in self.pictures if p[0].startswith(caption)]
        with Image.open(io.BytesIO(content)) as picture:
            return np.asarray(picture.convert("RGB")).astype(np.int16)


def checked(folder: Path, *arguments: object, code: int = 0) -> Page:
    page = folder.parent / "check.html"
    done = run("check", folder, "--page", page, *arguments)
    assert done.exit_code == code, done.output
    assert done.output.endswith(f"wrote {page}\n")
    assert not list(folder.parent.glob(".*"))
    return Page(page)


def squares_set(folder: Path, **first: Any) -> Path:
    """Gray images of 210x210 pixels with rectangles on both sides of COCO's limits of size.

    `first` changes the first annotation, a rectangle of 40x30 pixels at (20, 100).
    """
    sizes = [[(40, 30), (10, 10), (31, 33)], [(32, 32), (96, 95)], [(96, 96)], []]
    annotations = []
    for image, rectangles in enumerate(sizes, start=1):
        for number, (w, h) in enumerate(rectangles):
            x, y = 20 + 50 * number, 100
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": 1 + number % 2,
                 "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                 "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            )  # fmt: skip
    annotations[0] |= first
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for image in range(1, 5):
        Image.new("RGB", (210, 210), (128,) * 3).save(folder / "images" / f"{image}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 210, "width": 210} for i in range(1, 5)],
        "categories": [{"id": 1, "name": NAME}, {"id": 2, "name": "框"}],
        "annotations": annotations,
    }  # fmt: skip
    (folder / "annotations" / "instances.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("made", [squares_set, shapes_set])
def test_numbers_are_those_of_pycocotools(tmp_path: Path, made: Any) -> None:
    folder = made(tmp_path / "set")
    page = checked(folder)
    coco = COCO(str(folder / "annotations" / "instances.json"))
    objects = coco.loadAnns(coco.getAnnIds(iscrowd=False))
    facts = page.facts()
    assert facts["images"] == str(len(coco.imgs))
    assert facts["objects"] == str(len(objects))
    assert facts["crowds"] == str(len(coco.getAnnIds(iscrowd=True)))
    without = len(coco.imgs) - len({a["image_id"] for a in objects})
    assert facts["images without an object"] == str(without)
    areas = np.array([coco.annToMask(a).sum() for a in objects])
    small, large = int((areas < 32**2).sum()), int((areas >= 96**2).sum())
    counts = {
        row[0]: row[-1] for row in page.rows if row and row[0] in ("small", "medium", "large")
    }
    expected = {"small": small, "medium": len(areas) - small - large, "large": large}
    assert counts == {name: str(count) for name, count in expected.items()}
    if made is squares_set:
        assert expected == {"small": 2, "medium": 3, "large": 1}
    by_name = {row[0]: row[1:3] for row in page.rows if row}
    for category in coco.cats.values():
        own = [a for a in objects if a["category_id"] == category["id"]]
        images = {a["image_id"] for a in own}
        assert by_name[category["name"]] == [str(len(images)), str(len(own))]
    survey = Survey.of(open_source(str(folder), "train", shapes_images=1, shapes_seed=0), ())
    np.testing.assert_allclose(np.sort(survey.sides**2), np.sort(areas))
    per_image = [len(coco.getAnnIds(imgIds=id_, iscrowd=False)) for id_ in coco.getImgIds()]
    assert survey.per_image.tolist() == per_image
    sizes = [[i["height"], i["width"]] for i in coco.loadImgs(coco.getImgIds())]
    assert survey.image_sizes.tolist() == sizes


def test_the_page_holds_everything_itself_and_escapes_names(tmp_path: Path) -> None:
    page = checked(squares_set(tmp_path / "set"))
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"https?:|url\(", page.source)
    assert not page.tags & {"b", "script", "link", "iframe"}
    assert NAME in page.text
    assert "框" in page.text
    assert "The whole data set is used." in page.text
    assert "color-scheme: light dark" in page.source
    names = [name for name, _ in page.pictures]
    assert names[-3:] == ["object size", "image size", "objects per image"]
    assert 5 <= len(names) <= 12 + 3
    for _, content in page.pictures:
        with Image.open(io.BytesIO(content)) as picture:
            assert max(picture.size) <= 800


def test_a_box_far_from_its_mask_is_drawn_with_it(tmp_path: Path) -> None:
    """210 pixels are shown by 420, so coordinates are doubled."""
    page = checked(squares_set(tmp_path / "set", bbox=[120, 10, 50, 40]))
    assert "1 box far from their masks" in page.text
    caption = f"1.png: {NAME}: box [120, 10, 50, 40], mask x 20..60, y 100..130"
    picture = page.picture(caption)
    assert picture.shape == (420, 420, 3)
    differs = abs(picture - 128).max(axis=2) > 15
    assert differs[2 * 100 + 6 : 2 * 130 - 6, 2 * 20 + 6 : 2 * 60 - 6].all()  # the mask's tint
    for edge in (
        differs[20:100, 240], differs[20:100, 339], differs[20, 240:340], differs[99, 240:340],
        differs[200:260, 40], differs[200:260, 119], differs[200, 40:120], differs[259, 40:120],
    ):  # fmt: skip
        assert edge.all()
    assert not differs[30:90, 250:330].any()  # a box is not filled
    assert differs.mean() < 0.1


def test_a_clipped_box_is_shown_with_its_example(tmp_path: Path) -> None:
    page = checked(squares_set(tmp_path / "set", bbox=[-5, 100, 65, 30]), code=1)
    assert "1 box partly outside the image (clipped)" in page.text
    assert "A part is left out or changed." in page.text
    picture = page.picture("1.png annotation 1: [-5, 100, 65, 30]")
    assert (abs(picture - 128).max(axis=2) > 15)[200:260, 119].all()


def test_small_objects_are_enlarged(tmp_path: Path) -> None:
    page = checked(squares_set(tmp_path / "set"))
    picture = page.picture("1.png: 框, 100 pixels")
    inside = abs(picture - 128).max(axis=2) > 15
    assert inside.mean() == pytest.approx(100 / 50**2, rel=0.4)  # of 50x50 pixels around it


def test_images_that_are_missing_or_broken_do_not_end_it(tmp_path: Path) -> None:
    folder = squares_set(tmp_path / "set")
    (folder / "images" / "2.png").unlink()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (210, 210, 3), np.uint8)
    Image.fromarray(noise).save(folder / "images" / "1.png")
    assert cut_off(folder).name == "1.png"  # the image of most objects
    page = checked(folder, code=1)
    assert "1 image without a file (left out)" in page.text
    captions = [name for name, _ in page.pictures]
    assert not [name for name in captions if name.startswith(("1.png", "2.png"))]
    assert [name for name in captions if name.startswith("3.png")]


def test_a_set_without_objects_has_a_page(tmp_path: Path) -> None:
    folder = squares_set(tmp_path / "set")
    edit(folder, lambda content: content.update(annotations=[]))
    page = checked(folder)
    assert [name for name, _ in page.pictures] == ["image size", "objects per image"]


def test_json_on_the_terminal_stays_json(tmp_path: Path) -> None:
    page = tmp_path / "check.html"
    done = run("check", squares_set(tmp_path / "set"), "--page", page, "--json", "-")
    assert json.loads(done.stdout)["objects"] == 6
    assert page.exists()


def test_what_is_missing_is_told_before_the_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("check", tmp_path / "none", "--page", tmp_path / "no" / "check.html")
    assert done.exit_code == 1
    assert "its folder does not exist; make it first" in done.output
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("check", tmp_path / "none", "--page", tmp_path / "check.html")
    assert done.exit_code == 1
    assert done.output == "error: --page needs matplotlib: pip install 'comask[train]'\n"
    assert run("check", squares_set(tmp_path / "set")).exit_code == 0


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "check.html").mkdir()
    done = run("check", squares_set(tmp_path / "set"), "--page", tmp_path / "check.html")
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith(
        f"error: --page {tmp_path / 'check.html'}: cannot be"
    )


@pytest.mark.slow
def test_a_browser_opens_it_without_an_error(tmp_path: Path) -> None:
    told = BROWSER.read_text().strip() if BROWSER.exists() else ""
    program = shutil.which("chromium")
    if told != "ready" or program is None:
        pytest.skip(told or "no browser: tests/install_debian.py gets one")
    checked(squares_set(tmp_path / "set", bbox=[120, 10, 50, 40]))
    done = subprocess.run(
        [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         (tmp_path / "check.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Worth a look" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
