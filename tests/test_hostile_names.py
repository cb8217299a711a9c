"""Names made to do harm: they are shown as one line, and lead nowhere but where they may."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run
from PIL import Image

from comask.bundle import MANIFEST, Bundle
from comask.data.check import sound_part
from comask.data.coco import read_coco
from comask.errors import BundleError, ImageError, one_line

NAMES = [
    b"a b.png", "ünï-日本.png".encode(), b"new\nline.png", b"quo'te\".png", b"--help.png",
    b"esc\x1b[31mred\x07.png", b"[glob]*.png", b"tab\t.png", b"%s{x}.png", b"not-utf8\xff\xfe.png",
]  # fmt: skip
UNSEEN = set("\x1b\x07\u202e")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\n c", "a b c"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("\udcff", r"\udcff"),
        ("abc\u202etxt", r"abc\u202etxt"),
        ("ünï 日本", "ünï 日本"),
    ],
)
def test_one_line_is_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_images_and_folders_of_any_name(micro_bundle: Path, tmp_path: Path) -> None:
    folder, broken = tmp_path / "we ird\nfold\x1b[1mer", tmp_path / "broken"
    folder.mkdir()
    broken.mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "plain.png")
    for name in NAMES:
        shutil.copy(tmp_path / "plain.png", folder / os.fsdecode(name))
        (broken / os.fsdecode(name)).write_text("no image")
    bundle = shutil.copytree(micro_bundle, tmp_path / "bun\ndle\x1b[1m")
    output = tmp_path / "out\nput"
    result = run("infer", bundle, folder, broken, "--output", output,
                 "--save", "overlay,coco,labels", "--json", tmp_path / "r.json")  # fmt: skip
    assert result.exit_code == 1, result.output
    assert not UNSEEN & set(result.output)
    skipped = [line for line in result.output.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == len(NAMES)
    assert len(json.loads((tmp_path / "r.json").read_text())["failures"]) == len(NAMES)
    found = {entry["file_name"] for entry in json.loads((output / "images.json").read_text())}
    assert {os.fsencode(Path(name).name) for name in found} == set(NAMES)
    assert {name + b".overlay.png" for name in NAMES} <= set(os.listdir(os.fsencode(output)))


@pytest.mark.parametrize(
    "arguments",
    [
        ("infer", "BAD", "x.png", "--output", "OUT"),
        ("infer", "BUNDLE", "BAD", "--output", "OUT"),
        ("export", "BAD"),
        ("eval", "BAD", "--data", "shapes"),
        ("eval", "BUNDLE", "--data", "BAD"),
        ("bench", "BAD"),
        ("train", "--data", "BAD", "--output", "OUT"),
    ],
)
def test_errors_about_such_names_are_one_line(
    micro_bundle: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    places = {
        "BAD": str(tmp_path / "no\n\x1b[31mne\u202e"),
        "OUT": str(tmp_path / "out"),
        "BUNDLE": str(micro_bundle),
    }
    result = run(*(places.get(text, text) for text in arguments))
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert result.output.startswith("error: ")
    assert not UNSEEN & set(result.output)


def test_doctor_shows_such_a_name_on_one_line(tmp_path: Path) -> None:
    result = run("doctor", tmp_path / "no\n\x1b[31mne")
    assert result.exit_code == 1
    assert r"no \x1b[31mne: no bundle here" in result.output


@pytest.mark.parametrize(
    "name", ["../" * 20 + "etc/passwd", "/etc/passwd", "a/../../x", "nul\0", "esc\x1b[1m"]
)
def test_a_manifest_lists_files_of_its_bundle_alone(
    micro_bundle: Path, tmp_path: Path, name: str
) -> None:
    content = json.loads((micro_bundle / MANIFEST).read_text())
    content["files"][name] = hashlib.sha256(Path("/etc/passwd").read_bytes()).hexdigest()
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="cannot be a file of the bundle") as caught:
        Bundle.open(tmp_path)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (lambda path, file: path.symlink_to(file), "is a link out of the bundle"),
        (lambda path, file: os.mkfifo(path), "is not a file"),
        (lambda path, file: path.mkdir(), "is not a file"),
    ],
)
def test_links_out_of_a_bundle_and_pipes_are_refused(
    micro_bundle: Path, tmp_path: Path, put: Callable[[Path, Path], None], words: str
) -> None:
    bundle = Bundle.open(shutil.copytree(micro_bundle, tmp_path / "bundle"))
    path = bundle.folder / "weights.safetensors"
    path.rename(bundle.folder / "inside")
    path.symlink_to("inside")
    assert bundle.file(path.name) == path
    path.unlink()
    put(path, micro_bundle / path.name)
    with pytest.raises(BundleError, match=words):
        bundle.file(path.name)
    (bundle.folder / MANIFEST).rename(tmp_path / MANIFEST)
    put(bundle.folder / MANIFEST, tmp_path / MANIFEST)
    with pytest.raises(BundleError, match=words):
        Bundle.open(bundle.folder)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png"])
def test_a_data_set_reads_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    for place in ("secret.png", "images/a/good.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    entries = [
        {"id": i, "file_name": file, "width": 8, "height": 8}
        for i, file in enumerate([name, "a/good.png"])
    ]
    content = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "car"}]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    source = read_coco(tmp_path / "c.json", tmp_path / "images")
    with pytest.raises(ImageError, match="leads out of"):
        source.image(0)
    part, problems = sound_part(source)
    assert [part.info(i).file_name for i in range(len(part))] == ["a/good.png"]
    assert [problem.count for problem in problems] == [1]
