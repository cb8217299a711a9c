"""Which files are images and videos, by content where the name does not tell; what is passed over."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_clips import make_clip, pictures

from comask import preprocess
from comask.errors import ComaskError, ImageError
from comask.media_files import (
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    PassedOver,
    find_media,
    kind_from_content,
    kind_from_name,
    match_pattern,
)
from comask.preprocess import decode_image
from comask.runtime.jobs.listing import addresses

FORMATS = {
    "jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "mpo": "MPO", "png": "PNG",
    "apng": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "dib": "DIB", "gif": "GIF",
    "jp2": "JPEG2000", "ppm": "PPM", "avif": "AVIF", "HEIC": "HEIF",
}  # fmt: skip


def save(path: Path, form: str) -> None:
    if form == "HEIF":
        pytest.importorskip(
            "pillow_heif", reason="pip install 'comask[heif]'"
        ).register_heif_opener()
    more = {}
    if form == "MPO":
        more = {"save_all": True, "append_images": [Image.fromarray(pictures(2)[1])]}
    Image.fromarray(pictures(1)[0]).save(path, form, **more)


@pytest.mark.parametrize(("suffix", "form"), FORMATS.items())
def test_every_format_is_found_and_decoded_whatever_it_is_called(
    tmp_path: Path, suffix: str, form: str
) -> None:
    image = Image.fromarray(pictures(1)[0])
    for name in (f"a.{suffix}", "b", "c.data", "d.mp4"):
        save(tmp_path / name, form)
        assert decode_image(tmp_path / name).shape == (*image.size[::-1], 3)
    if form != "DIB":  # which has no mark
        assert kind_from_content((tmp_path / "b").read_bytes()[:HEAD_BYTES]) == "image"
    found = find_media(str(tmp_path), frozenset({"image", "video"}), PassedOver())
    expected = {f"a.{suffix}", "d.mp4"} | ({"b", "c.data"} if form != "DIB" else set())
    assert {path.name for path in found} == expected


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi", "ts", "mpg", "flv"])
def test_videos_are_found_by_content(tmp_path: Path, suffix: str) -> None:
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpg": "mpeg2video"}.get(suffix, "libx264")
    clip = make_clip(tmp_path / f"a.{suffix}", pictures(12), audio=None, codec=codec)
    assert kind_from_content(clip.read_bytes()[:HEAD_BYTES]) == "video"
    assert kind_from_name(clip.name) == "video"


@given(st.binary(max_size=HEAD_BYTES))
def test_any_bytes_are_of_some_kind(head: bytes) -> None:
    assert kind_from_content(head) in ("image", "video", "other")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.JPG", "image"), ("a.jfif", "image"), ("a.MTS", "video"), ("a.txt", "other"), ("a", "other"),
        ("._a.jpg", "hidden"), ("._a.mp4", "hidden"), (".DS_Store", "hidden"), (".a.jpg", "image"),
        (".a.png.tmp", "hidden"), ("a.jpg.overlay.png", "result"), ("a.jpg.2.overlay.png", "result"),
        ("a.overlay.png", "result"), ("a.mp4.overlay.mkv", "result"), ("a.jpg.mask.png", "result"),
        ("a.jpg.2.mask.png", "result"), ("a.mask.png", "image"), ("a.jpg.labels.txt", "result"),
        ("overlay.png", "image"), ("detections.json", "result"), ("a.json", "other"),
        ("a.overlay.mp4", "result"), ("000001.view.jpg", "result"),
    ],
)  # fmt: skip
def test_kinds_by_name(name: str, kind: str) -> None:
    assert kind_from_name(name) == kind


def test_results_are_no_inputs_and_what_is_passed_over_is_counted(
    micro_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    save(folder / "a.jpg", "JPEG")
    save(folder / "._a.jpg", "JPEG")
    make_clip(folder / "b.mp4", pictures(3))
    (folder / "notes.txt").write_text("words")
    for attempt in range(3):
        named = sorted(folder.glob("[!.n]*"))
        inputs = [folder] if attempt < 2 else named  # as a shell expands it
        result = run("infer", micro_bundle, *inputs, "--output", folder, "--json", tmp_path / "r")
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "r").read_text())
        assert report["images"] == 1
        assert len(report["videos"]) == 1
        if attempt == 1:
            (line,) = [line for line in result.output.splitlines() if "earlier run" in line]
            assert line.startswith(f"{folder}: passed over 5 results of an earlier run: a.jpg.over")
            assert (
                f"{folder}: passed over 1 files that are neither images nor videos: notes.txt"
                in (result.output)
            )
    result = run("infer", micro_bundle, folder / "*.overlay.*", "--output", folder)
    assert result.exit_code == 1
    assert "the inputs are results of comask itself; rename one to run it" in result.output


def test_an_output_below_the_inputs_is_not_read_again(micro_bundle: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", "JPEG")
    for _ in range(2):
        result = run("infer", micro_bundle, tmp_path / "**" / "*.*", "--output", tmp_path / "out",
                     "--save", "overlay,masks")  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "1 of 1 images" in result.output


def test_a_job_reads_folders_by_content_and_says_what_it_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a[1]"
    folder.mkdir()
    for name in ("a.jpg", "b.jfif", "noname", "._a.jpg", "a.jpg.overlay.png"):
        save(folder / name, "JPEG")
    make_clip(folder / "c.mp4", pictures(2))
    (folder / "notes.txt").write_text("words")
    expected = [str(folder / name) for name in ("a.jpg", "b.jfif", "noname")]
    assert sorted(addresses(str(folder))) == expected
    text = caplog.text
    assert "passed over 1 videos: c.mp4" in text
    assert "passed over 1 files that are neither images nor videos: notes.txt" in text
    assert "passed over 1 results of an earlier run: a.jpg.overlay.png" in text
    assert list(addresses(str(folder / "*.j*"))) == expected[:2]


def test_patterns_reach_into_folders_of_any_name(tmp_path: Path) -> None:
    for folder in ("a[1]", "b*c", "d?", "e"):
        (tmp_path / folder / "in").mkdir(parents=True)
        (tmp_path / folder / "in" / "x.jpg").touch()
        for pattern in ("in/*.jpg", "**/*.jpg", "*/x.*"):
            found = list(match_pattern(str(tmp_path / folder / pattern)))
            assert found == [tmp_path / folder / "in" / "x.jpg"], pattern
    assert len(list(match_pattern(str(tmp_path / "*" / "in" / "*.jpg")))) == 4
    with pytest.raises(ComaskError, match="no such file or folder, and no file matches"):
        find_media(str(tmp_path / "none" / "*.jpg"), frozenset({"image"}), PassedOver())


def test_heic_without_its_package_is_named_with_the_remedy(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.heic", "HEIF")
    save(tmp_path / "b.avif", "AVIF")
    save(tmp_path / "c.png", "PNG")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        for form in ("HEIF", "AVIF"):
            patch.delitem(Image.OPEN, form)
        preprocess._readable_formats.cache_clear()
        result = run(
            "infer", micro_bundle, tmp_path, "--output", tmp_path / "out", "--save", "coco"
        )
        assert result.exit_code == 1
        assert "1 of 3 images" in result.output
        assert "a.heic: HEIC images need the package pillow-heif: pip install 'comask[heif]'" in (
            result.output
        )
        assert "b.avif: AVIF images need Pillow 11.3 or newer" in result.output
    preprocess._readable_formats.cache_clear()
    assert decode_image(tmp_path / "a.heic").dtype == np.uint8


def test_suffixes_are_of_one_kind() -> None:
    assert not IMAGE_SUFFIXES & VIDEO_SUFFIXES
    assert all(s == s.lower() and s.startswith(".") for s in IMAGE_SUFFIXES | VIDEO_SUFFIXES)


def test_results_of_one_image_that_cannot_be_written_are_its_own_problem(
    micro_bundle: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    long = f"{'n' * 246}.jpg"
    for name in ("a.jpg", "b.jpg", long):
        save(folder / name, "JPEG")
    (output / "a.jpg.overlay.jpg").mkdir(parents=True)
    result = run("infer", micro_bundle, folder, "--output", output)
    assert result.exit_code == 1
    assert "1 of 3 images" in result.output
    assert f"skipped: {folder / 'a.jpg'}: its results cannot be written: " in result.output
    assert f"skipped: {folder / long}: its results cannot be written: " in result.output
    assert [entry["id"] for entry in json.loads((output / "images.json").read_text())] == [1]
    (output / "detections.json").unlink()
    (output / "detections.json").mkdir()
    result = run("infer", micro_bundle, folder, "--output", output)
    assert result.exit_code == 1
    assert f"--output {output}: detections.json in it is a folder; remove it" in result.output


class Choosy:
    """A backend that refuses images whose first pixel is white, as an engine does a large canvas."""

    largest_batch, proposals, device, gpu, backend = None, None, "cpu", None, "choosy"

    def run(self, images: np.ndarray, image_sizes: np.ndarray) -> dict[str, np.ndarray]:
        if (images[:, 0, 0] == 255).all(axis=1).any():
            raise RuntimeError("no such canvas")
        shapes = {"boxes": (0, 4), "scores": (0,), "labels": (0,), "masks": (0, 28, 28)}
        count = len(images)
        nothing = {name: np.zeros((count, *shape), np.float32) for name, shape in shapes.items()}
        return nothing | {"num_detections": np.zeros(count, np.int64)}

    def close(self) -> None:
        """Frees nothing."""


def test_an_image_that_the_backend_refuses_does_not_end_the_others() -> None:
    from comask.config import PreprocessConfig
    from comask.runtime import Predictor

    predictor = Predictor(Choosy(), PreprocessConfig(short_side=32, max_side=64))  # type: ignore[arg-type]
    images = [np.full((32, 32, 3), value, np.uint8) for value in (0, 255, 9, 255, 7)]

    def undecodable() -> np.ndarray:
        raise ImageError("5: broken")

    def load(number: int) -> np.ndarray:
        return images[number] if number < 5 else undecodable()

    results = list(predictor.map(range(6), load))
    assert [result.item for result in results] == list(range(6))
    assert [bool(result.error) for result in results] == [False, True, False, True, False, True]
    assert str(results[1].error) == "1: cannot be run: no such canvas"
    assert str(results[5].error) == "5: broken"
    assert results[5].pixels is None
    with pytest.raises(ImageError, match="5: broken"):
        _ = results[5].detections
    with pytest.raises(RuntimeError, match="no such canvas"):
        list(predictor.map(range(6), load, isolate=False))
    assert str(list(predictor.map(images))[1].error) == "image 1: cannot be run: no such canvas"
    predictor.stages.run = lambda *_: (_ for _ in ()).throw(RuntimeError("gone"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="gone"):  # the backend's fault, and no image's
        list(predictor.map(images))
