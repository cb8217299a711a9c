"""The page of `comask infer` holds what was found; tests/test_result_page_in_browser.py opens it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import cv2
import numpy as np
import pytest
from conftest import run
from made_results import CLASSES, HOSTILE, SOURCE, found_in
from numpy.typing import NDArray
from PIL import Image
from read_results import entries, filled, script
from video_clips import make_clip, pictures

import comask.result_page
from comask.bundle import ScoreThresholds, update_manifest
from comask.data.coco import write_coco
from comask.data.shapes import ShapesSource
from comask.draw import draw_overlay
from comask.errors import ComaskError
from comask.result_page import ResultPage
from comask.runtime import Predictor
from comask.structures import Detections


def assert_alike(shown: NDArray[np.bool_], mask: NDArray[np.bool_]) -> None:
    """They differ by less than a pixel at the mask's edge, and nowhere else."""
    cross = np.ones((3, 3), np.uint8)
    pixels = mask.astype(np.uint8)
    border = cv2.dilate(pixels, cross) != cv2.erode(pixels, cross)
    assert not (shown ^ mask)[~border].any()
    assert (shown ^ mask).sum() <= 0.3 * border.sum()


def written(folder: Path, count: int) -> list[Detections]:
    page = ResultPage(folder)
    page.start(CLASSES, 0.5)
    found = [found_in(index) for index in range(count)]
    for index, one in enumerate(found):
        page.add(page.write_image(page.number(), f"in/{index}.png", SOURCE.image(index), one))
    assert page.finish([]) == folder / "index.html"
    return found


def test_it_holds_what_was_found(tmp_path: Path) -> None:
    found = written(tmp_path, 6)
    there = entries(tmp_path)
    assert list(there) == [f"in/{index}.png" for index in range(6)]
    assert sum(map(len, found)) > 10
    for one, entry in zip(found, there.values(), strict=True):
        assert entry["size"] == one.image_size[::-1]
        np.testing.assert_array_equal(entry["labels"], one.labels)
        np.testing.assert_array_equal(entry["scores"], one.scores)
        np.testing.assert_array_equal(entry["areas"], one.masks.sum(axis=(1, 2)))
        details = script(tmp_path, f"{entry['number']:06}.js", "details")
        np.testing.assert_allclose(
            np.reshape(details["boxes"], (-1, 4)), one.boxes_xyxy, atol=0.0501
        )
        assert tuple(details["size"]) == entry["size"]
        for mask, text in zip(one.masks, details["masks"], strict=True):
            drawn_mask = filled(text, details["size"])
            assert (mask & drawn_mask).sum() / (mask | drawn_mask).sum() > 0.95
        for suffix, largest in (("thumb", 320), ("view", 2048)):
            with Image.open(tmp_path / "page" / f"{entry['number']:06}.{suffix}.jpg") as picture:
                assert picture.size == entry["size"] or max(picture.size) == largest


def test_holes_and_single_pixels_are_outlined() -> None:
    for side, hole in ((40, (10, 20, 20, 30)), (1, None)):
        mask = np.zeros((60, 60), bool)
        mask[5 : 5 + side, 5 : 5 + side] = True
        if hole:
            mask[hole[0] : hole[2], hole[1] : hole[3]] = False
        area, text = comask.result_page._mask(_exact(mask), 0, (60, 60))
        assert area == mask.sum()
        assert len(text.split()) == (2 if hole else 1)
        np.testing.assert_array_equal(filled(text, (60, 60)), mask)
    assert comask.result_page._mask(_exact(np.zeros((60, 60), bool)), 0, (60, 60)) == (0, "")


def _exact(mask: NDArray[np.bool_]) -> Detections:
    """One detection whose mask has a cell per pixel."""
    height, width = mask.shape
    return Detections(
        boxes_xyxy=np.array([[0, 0, width, height]], np.float32),
        scores=np.ones(1, np.float32),
        labels=np.zeros(1, np.int64),
        mask_probs=mask[None].astype(np.float32),
        image_size=(height, width),
    )


def test_large_images_are_made_smaller_with_their_masks(tmp_path: Path) -> None:
    mask = np.zeros((2, 2), bool)
    mask[1, 1] = True  # the lower right quarter
    found = replace(
        _exact(mask),
        image_size=(2400, 6000),
        boxes_xyxy=np.array([[0, 0, 6000, 2400]], np.float32),
    )
    page = ResultPage(tmp_path)
    page.start(("x",), 0.5)
    page.add(page.write_image(page.number(), "a.png", np.zeros((2400, 6000, 3), np.uint8), found))
    page.finish([])
    details = script(tmp_path, "000001.js", "details")
    assert details["size"] == [2048, 819]
    whole = cv2.resize(found.masks[0].astype(np.float32), (2048, 819), interpolation=cv2.INTER_AREA)
    assert_alike(filled(details["masks"][0], (2048, 819)), whole >= 0.5)
    assert entries(tmp_path)["a.png"]["areas"] == found.masks.sum()


def test_entries_are_written_in_parts_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comask.result_page, "_PART", 2)
    page = ResultPage(tmp_path)
    page.start(CLASSES, 0.5)
    for index in range(5):
        one = found_in(index)
        page.add(page.write_image(page.number(), f"{index}", SOURCE.image(index), one))
        parts = sorted(path.name for path in (tmp_path / "page").glob("results-*.js"))
        assert parts == [f"results-{part:04}.js" for part in range(1, (index + 1) // 2 + 1)]
    page.finish([])
    assert list(entries(tmp_path)) == list("01234")


def test_names_do_no_harm_and_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = ResultPage(tmp_path)
    page.start([HOSTILE, "b\nc"], (0.25, 0.5), {"bundle": HOSTILE})
    number, one = page.number(), found_in(0)[:0]
    page.add(page.write_image(number, HOSTILE + os.fsdecode(b"\xff"), SOURCE.image(0), one))
    page.finish([{"file": HOSTILE, "error": f"{HOSTILE}: empty"}], whole=False)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".html", ".js", ".css"):
            text = path.read_text()
            assert "http" not in text.replace("http://www.w3.org", "")
            assert "url(" not in text
            assert path.name in ("summary.js", "results-0001.js") or "onerror=alert" not in text
    addresses = re.findall(r'(?:src|href)="([^"]*)"', (tmp_path / "index.html").read_text())
    assert addresses
    assert all((tmp_path / address).is_file() for address in addresses)
    summary = script(tmp_path, "summary.js", "summary")
    assert summary["classes"][1] == "b c"
    assert summary["thresholds"] == [0.25, 0.5]
    assert (summary["whole"], len(summary["failures"]), len(summary["colors"])) == (False, 1, 2)
    (name,) = entries(tmp_path)
    assert name.isprintable()
    assert name.startswith("<img src=x onerror=alert(1)>")


def test_a_new_run_replaces_the_page_of_an_earlier_one(tmp_path: Path) -> None:
    written(tmp_path, 4)
    (tmp_path / "page" / "notes.txt").write_text("mine")
    written(tmp_path, 2)
    assert len(entries(tmp_path)) == 2
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert {name[:6] for name in names if name[0] == "0"} == {"000001", "000002"}
    assert "notes.txt" in names


@pytest.mark.parametrize("taken", ["index.html", "index.html/", "page"])
def test_what_is_somebody_elses_is_kept(tmp_path: Path, taken: str) -> None:
    path = tmp_path / taken.rstrip("/")
    path.mkdir() if taken.endswith("/") else path.write_text("mine")
    with pytest.raises(ComaskError, match="in it is"):
        ResultPage(tmp_path)
    assert path.is_dir() or path.read_text() == "mine"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three sound images, of which one has a name that is not UTF-8, and an empty file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, name in enumerate(("a.png", "b.jpg", os.fsdecode(b"\xff<b>.png"))):
        Image.fromarray(SOURCE.image(index)).save(folder / name)
    (folder / "zero.jpg").write_bytes(b"")
    return folder


def test_page_alone(micro_bundle: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("infer", micro_bundle, photos, "--output", output, "--save", "page",
                 "--json", tmp_path / "r.json")  # fmt: skip
    assert result.exit_code == 1, result.output
    assert f"page: {output / 'index.html'}" in result.output
    assert sorted(path.name for path in output.iterdir()) == ["index.html", "page"]
    there, report = entries(output), json.loads((tmp_path / "r.json").read_text())
    assert [Path(name).name for name in there] == ["a.png", "b.jpg", r"\udcff<b>.png"]
    assert sum(len(entry["labels"]) for entry in there.values()) == report["detections"] > 0
    with Predictor.load(micro_bundle) as predictor:
        found = predictor(photos / "a.png")
    np.testing.assert_allclose(there[str(photos / "a.png")]["scores"], found.scores, atol=1e-4)
    summary = script(output, "summary.js", "summary")
    (failure,) = summary["failures"]
    assert "zero.jpg: the file is empty" in failure["error"]
    assert summary["classes"] == CLASSES
    assert summary["thresholds"] == 0.5
    assert summary["whole"]


def test_the_page_does_not_change_the_other_results(
    micro_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    for name, save in (("with", "overlay,coco,page"), ("without", "overlay,coco")):
        run("infer", micro_bundle, photos, "--output", tmp_path / name, "--save", save)
    names = [path.name for path in (tmp_path / "without").iterdir()]
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def before_batches(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Calls `act` with the number of each batch, from 1 on, before the batch runs."""
    predict, count = Predictor.predict_stages, itertools.count(1)

    def predict_stages(self: Predictor, prepared: Any) -> Any:
        act(next(count))
        return predict(self, prepared)

    monkeypatch.setattr(Predictor, "predict_stages", predict_stages)


def test_an_interrupted_run_has_a_page_of_what_it_did(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco(ShapesSource(num_images=12, seed=4), tmp_path)

    def interrupt(batch: int) -> None:
        if batch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before_batches(monkeypatch, interrupt)
    result = run("infer", micro_bundle, tmp_path / "images", "--output", tmp_path / "out",
                 "--batch", 1, "--save", "page,coco")  # fmt: skip
    assert result.exit_code == 130, result.output
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    assert list(entries(tmp_path / "out")) == [image["file_name"] for image in images]
    assert 0 < len(images) < 12
    assert not script(tmp_path / "out", "summary.js", "summary")["whole"]


def test_a_run_that_fails_keeps_the_page_of_what_it_did(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco(ShapesSource(num_images=12, seed=4), tmp_path)

    def fail(batch: int) -> None:
        if batch >= 4:
            raise ComaskError("the backend is gone")

    before_batches(monkeypatch, fail)
    result = run("infer", micro_bundle, tmp_path / "images", "--output", tmp_path / "out",
                 "--batch", 1, "--save", "page")  # fmt: skip
    assert result.exit_code == 1
    assert "error: the backend is gone" in result.output
    assert 0 < len(entries(tmp_path / "out")) < 12
    assert not script(tmp_path / "out", "summary.js", "summary")["whole"]


def test_a_bundle_that_does_not_open_leaves_the_earlier_page(
    micro_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    written(tmp_path / "out", 1)
    Image.fromarray(SOURCE.image(0)).save(tmp_path / "a.png")
    for bundle, backend in ((tmp_path / "none", "auto"), (micro_bundle, "onnxruntime:int8")):
        result = run("infer", bundle, tmp_path / "a.png", "--output", tmp_path / "out",
                     "--save", "page", "--backend", backend)  # fmt: skip
        assert result.exit_code == 1
        assert len(entries(tmp_path / "out")) == 1


def test_a_video_has_a_timeline_and_its_overlay(micro_bundle: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a #1%.mp4", pictures(20), audio=None)
    (tmp_path / "b.mp4").write_text("no video")
    output = tmp_path / "out"
    result = run("infer", micro_bundle, clip, tmp_path / "b.mp4", "--output", output,
                 "--save", "page,overlay,coco", "--threshold", 0.2)  # fmt: skip
    assert result.exit_code == 1, result.output
    ((name, entry),) = entries(output).items()
    assert name == str(clip)
    video = entry["video"]
    assert unquote_to_bytes(video["overlay"]) == b"a #1%.mp4.overlay.mp4"
    assert video["frames"] == 20
    assert video["seconds"] == pytest.approx(19 / 25)
    lines = [json.loads(line) for line in (output / f"{clip.name}.jsonl").read_text().splitlines()]
    found = [(r["category_id"] - 1, r["score"]) for line in lines for r in line["detections"]]
    counts = script(output, f"{entry['number']:06}.js", "details")["timeline"]["counts"]
    assert {int(label): sum(cells[2::3]) for label, cells in counts.items()} == Counter(
        label for label, _ in found
    )
    assert dict(video["best"]) == pytest.approx(
        {label: max(score for other, score in found if other == label) for label, _ in found}
    )
    most = max(sum(r["score"] >= 0.2 for r in line["detections"]) for line in lines)
    assert (entry["scores"] >= np.float32(0.2)).sum() == most
    (failure,) = script(output, "summary.js", "summary")["failures"]
    assert "b.mp4: cannot be opened" in failure["error"]


def test_a_video_without_an_overlay_has_none(micro_bundle: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(3), audio=None)
    result = run("infer", micro_bundle, clip, "--output", tmp_path / "out", "--save", "page")
    assert result.exit_code == 0, result.output
    assert entries(tmp_path / "out")[str(clip)]["video"]["overlay"] is None


def test_thresholds_of_the_bundle(micro_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "zero.jpg").unlink()
    arguments = ("--output", tmp_path / "out", "--threshold", "auto", "--save", "overlay,page")
    result = run("infer", micro_bundle, photos / "a.png", *arguments)
    assert result.exit_code == 1
    assert "--threshold auto: the bundle has no score thresholds" in result.output
    assert "comask eval BUNDLE" in result.output
    assert not (tmp_path / "out").exists()
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")
    with Predictor.load(bundle) as predictor:
        found = predictor(photos / "a.png")
    own = dict.fromkeys(CLASSES, 1.0) | {CLASSES[int(found.labels[0])]: 0.0}
    measured = ScoreThresholds(classes=own, backend="torch", data="shapes", images=1)
    update_manifest(bundle, lambda manifest: replace(manifest, thresholds=measured))
    result = run("infer", bundle, photos / "a.png", *arguments)
    assert result.exit_code == 0, result.output
    summary = script(tmp_path / "out", "summary.js", "summary")
    assert summary["thresholds"] == [own[name] for name in CLASSES]
    chosen = found[(found.labels == found.labels[0]) | (found.scores >= 1)]
    assert 0 < len(chosen) < len(found)
    overlay = np.asarray(Image.open(tmp_path / "out" / "a.png.overlay.png"))
    np.testing.assert_array_equal(overlay, draw_overlay(SOURCE.image(0), chosen))


def test_what_has_no_effect_or_is_wrong_is_refused(
    micro_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<h1>mine</h1>")
    for options, code, words in (
        (("--save", "coco", "--threshold", "auto"), 2, "--threshold auto: nothing is drawn"),
        (("--threshold", "1.5"), 2, "1.5 is not in the range"),
        (("--threshold", "best"), 2, "'best' is not a valid float"),
        (("--save", "page,pages"), 2, "--save pages: choose from"),
        (("--save", "page", "--output", tmp_path / "site"), 1, "not a page of comask infer"),
    ):
        result = run("infer", micro_bundle, photos, "--output", tmp_path / "out", *options)
        assert (result.exit_code, words in result.output) == (code, True), result.output
    assert (tmp_path / "site" / "index.html").read_text() == "<h1>mine</h1>"
