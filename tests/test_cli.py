"""Whole commands as a user types them, with right and wrong inputs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run
from PIL import Image
from pycocotools import mask as coco_mask
from video_clips import make_clip
from video_clips import pictures as pictures_of_clip

import comask.preprocess
from comask.bundle import SCHEMA_VERSION
from comask.data.coco import write_coco
from comask.data.shapes import ShapesSource
from comask.evaluate import METRICS, CocoMetrics
from comask.parallel import MOST_THREADS
from comask.runtime import Predictor
from comask.runtime.parity.evaluation import Evaluation
from comask.runtime.parity.scores import Scores


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three sound images and two that are none."""
    folder = tmp_path / "in put"
    folder.mkdir()
    source = ShapesSource(num_images=3, seed=4)
    for index, suffix in enumerate(("png", "tiff", "png")):
        Image.fromarray(source.image(index)).save(folder / f"{index}.{suffix}")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    return folder


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_infer_keeps_the_good_and_reports_the_bad(
    micro_bundle: Path, pictures: Path, tmp_path: Path, backend: str
) -> None:
    output = tmp_path / "out"
    result = run(
        "infer", micro_bundle, pictures, "--output", output, "--backend", backend,
        "--save", "overlay,masks,coco,labels", "--threshold", "0", "--json", output / "report.json",
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "3 of 5 images" in result.output
    assert "zero.jpg: the file is empty" in result.output
    assert "text.png: not an image of a known format" in result.output
    names = sorted(path.name for path in output.iterdir())
    expected = [f"{image}.{kind}" for image in ("0.png", "1.tiff", "2.png")
                for kind in ("labels.txt", "mask.png", "overlay.png")]  # fmt: skip
    assert names == sorted([*expected, "detections.json", "images.json", "report.json"])

    report = json.loads((output / "report.json").read_text())
    assert report["backend"].startswith(backend)
    assert len(report["failures"]) == 2
    found = json.loads((output / "detections.json").read_text())
    images = {entry["id"]: entry for entry in json.loads((output / "images.json").read_text())}
    assert len(found) == report["detections"] > 0
    for entry in found:
        image = images[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        assert -0.01 <= x <= x + w <= image["width"] + 0.01
        assert -0.01 <= y <= y + h <= image["height"] + 0.01
        assert entry["segmentation"]["size"] == [image["height"], image["width"]]
        assert coco_mask.area(entry["segmentation"]) <= image["height"] * image["width"]
    instances = np.asarray(Image.open(output / "0.png.mask.png"))
    assert instances.max() <= len((output / "0.png.labels.txt").read_text().splitlines())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_infer_keeps_what_was_done(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals, code: int,
) -> None:  # fmt: skip
    write_coco(ShapesSource(num_images=12, seed=4), tmp_path)
    predict = Predictor.predict_stages
    count = itertools.count(1)

    def interrupted(self: Predictor, prepared: Any) -> Any:
        if next(count) == 2:  # of the windows, which have two images
            os.kill(os.getpid(), number)
        return predict(self, prepared)

    monkeypatch.setattr(Predictor, "predict_stages", interrupted)
    clip = make_clip(tmp_path / "clip.mp4", pictures_of_clip(3), audio=None)
    result = run("infer", micro_bundle, tmp_path / "images", clip, "--output", tmp_path / "out",
                 "--batch", 1, "--json", tmp_path / "r.json")  # fmt: skip
    assert result.exit_code == code, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    done = report["images"]  # two windows, and what other threads had begun to decode
    assert 4 <= done <= 4 + 2 + MOST_THREADS < 12
    assert f"interrupted after {done} of 12 images" in result.output
    assert (report["interrupted"], report["videos"]) == (True, [])
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [entry["id"] for entry in images] == list(range(1, done + 1))
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["image_id"] for entry in found} == set(range(1, done + 1))
    assert len(found) == report["detections"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_does_not_wait(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco(ShapesSource(num_images=30, seed=4), tmp_path)
    decode = comask.preprocess.decode_image
    count = itertools.count(1)

    def interrupted(path: Path) -> Any:
        if next(count) == 15:  # when the first windows' results were taken
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # until the main thread has handled it
            os.kill(os.getpid(), signal.SIGINT)
        return decode(path)

    monkeypatch.setattr("comask.preprocess.decode_image", interrupted)
    result = run("infer", micro_bundle, tmp_path / "images", "--output", tmp_path / "out",
                 "--batch", 1)  # fmt: skip
    assert result.exit_code == 130, result.output
    assert 0 < len(json.loads((tmp_path / "out" / "images.json").read_text())) < 15


def test_overlays_keep_the_format_of_their_image(micro_bundle: Path, tmp_path: Path) -> None:
    source = ShapesSource(num_images=1, seed=4)
    for name in ("a.jpg", "b.JPEG", "c.png", "d.webp"):
        Image.fromarray(source.image(0)).save(tmp_path / name)
    expected = {"auto": ["JPEG", "JPEG", "PNG", "PNG"], "jpeg": ["JPEG"] * 4, "png": ["PNG"] * 4}
    for chosen, formats in expected.items():
        output = tmp_path / chosen
        result = run("infer", micro_bundle, tmp_path / "*.*", "--output", output,
                     "--overlay-format", chosen, "--threshold", 0)  # fmt: skip
        assert result.exit_code == 0, result.output
        for name, kind in zip(("a.jpg", "b.JPEG", "c.png", "d.webp"), formats, strict=True):
            suffix = {"JPEG": "jpg", "PNG": "png"}[kind]
            with Image.open(output / f"{name}.overlay.{suffix}") as picture:
                assert picture.format == kind
    lossless = np.asarray(Image.open(tmp_path / "png" / "a.jpg.overlay.png"), np.float32)
    errors = {}
    for quality in (30, 90, 100):
        output = tmp_path / str(quality)
        run("infer", micro_bundle, tmp_path / "a.jpg", "--output", output, "--quality", quality,
            "--threshold", 0)  # fmt: skip
        lossy = np.asarray(Image.open(output / "a.jpg.overlay.jpg"), np.float32)
        errors[quality] = float(np.abs(lossy - lossless).mean())
    assert errors[30] > errors[90] > errors[100]


def test_overlay_options_without_effect_are_refused(micro_bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    clip = make_clip(tmp_path / "clip.mp4", pictures_of_clip(2), audio=None)
    for arguments, text in (
        (("a.png", "--quality", 80), "--quality: no overlay would be a JPEG"),
        (("a.png", "--overlay-format", "png", "--quality", 80), "--quality: no overlay would be"),
        (("a.png", "--save", "coco", "--overlay-format", "png"), "add overlay to --save"),
        ((clip, "--overlay-format", "jpeg"), "--overlay-format: concerns images"),
        (("a.png", "--overlay-format", "jpeg", "--quality", 101), "101 is not in the range"),
    ):
        result = run("infer", micro_bundle, tmp_path / arguments[0], *arguments[1:],
                     "--output", tmp_path / "out")  # fmt: skip
        assert result.exit_code == 2, result.output
        assert text in result.output
        assert not (tmp_path / "out").exists()


def test_infer_takes_patterns_and_numbers_equal_names(
    micro_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "more")
    output = tmp_path / "out"
    result = run("infer", micro_bundle, tmp_path / "*" / "0.png", "--output", output,
                 "--save", "labels")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in output.iterdir()) == ["0.png.2.labels.txt", "0.png.labels.txt"]


def test_backends_agree_through_the_command(
    micro_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    found = []
    for backend in ("torch", "onnxruntime"):
        output = tmp_path / backend
        run("infer", micro_bundle, pictures, "--output", output, "--backend", backend,
            "--save", "coco")  # fmt: skip
        found.append(json.loads((output / "detections.json").read_text()))
    assert len(found[0]) == len(found[1]) > 0
    for a, b in zip(*found, strict=True):
        assert a["category_id"] == b["category_id"]
        np.testing.assert_allclose(a["bbox"], b["bbox"], atol=0.05)
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)


def test_infer_refuses_in_one_line(
    micro_run: Path, micro_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    output, job = tmp_path / "out", tmp_path / "job"
    job.mkdir()
    (job / "job.json").write_text("{}")
    for arguments, code, words in [
        ((micro_bundle, tmp_path / "none.jpg", "--output", output), 1, "no file matches"),
        ((micro_bundle, "none", pictures, "nor*", "--output", output), 1, "it; nor*: no such file"),
        ((micro_bundle, pictures.parent, "--output", output), 1, "subfolders are not searched"),
        ((tmp_path / "none", pictures, "--output", output), 1, "no bundle here: no such folder"),
        ((micro_bundle / "manifest.json", pictures, "--output", output), 1, "a bundle is a folder"),
        ((micro_run, pictures, "--output", output), 1, "checkpoint-best.pt --output bundle makes"),
        ((micro_bundle, pictures, "--output", job), 1, "holds a job"),
        ((tmp_path, pictures, "--output", output), 1, "manifest.json is missing"),
        ((micro_bundle, pictures, "--output", output, "--backend", "tpu"), 1, "unknown backend"),
        ((micro_bundle, pictures, "--output", output, "--backend", "onnxruntime:int8"), 1, "fp32"),
        ((micro_bundle, pictures, "--output", output, "--save", "video"), 2, "choose from"),
        ((micro_bundle, pictures), 2, "--output"),
        ((micro_bundle, pictures, "--output", pictures / "0.png"), 1, "is a file; --output is a"),
    ]:
        result = run("infer", *arguments)
        assert (result.exit_code, words in result.output) == (code, True), result.output
        assert "Traceback" not in result.output
    refused = run("export", micro_run, "--output", output)
    assert refused.exit_code == 1
    assert "is a training run: give " in refused.output


@pytest.mark.parametrize("name", ["stage2_roi_head.onnx", "weights.safetensors"])
def test_an_altered_or_missing_file_is_named(
    micro_bundle: Path, pictures: Path, tmp_path: Path, name: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(micro_bundle, bundle)
    backend = "torch" if name.startswith("weights") else "onnxruntime"
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    arguments = (bundle, pictures, "--output", tmp_path / "out", "--backend", backend)
    altered = run("infer", *arguments)
    assert altered.exit_code == 1
    assert name in altered.output
    assert "was altered" in altered.output
    (bundle / name).unlink()
    missing = run("infer", *arguments)
    assert missing.exit_code == 1
    assert name in missing.output
    assert "No such file" in missing.output


def test_manifest_errors_say_what_to_do(micro_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    manifest = json.loads((micro_bundle / "manifest.json").read_text())
    for content, words in [
        ("{", "not a comask manifest"),
        (json.dumps(manifest | {"schema_version": 99}), "manifest schema 99"),
        (json.dumps(manifest | {"surplus": 1}), "surplus"),
        (json.dumps(manifest | {"categories": []}), "0 categories for 8 classes"),
        (json.dumps({"schema_version": SCHEMA_VERSION}), "not a comask manifest"),
    ]:
        (bundle / "manifest.json").write_text(content)
        result = run("infer", bundle, pictures, "--output", tmp_path / "out")
        assert result.exit_code == 1
        assert words in result.output, result.output


def test_eval_measures_records_and_exits(micro_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(micro_bundle, bundle)
    arguments = (bundle, "--data", "shapes", "--limit", "6", "--json", tmp_path / "r.json")
    for _ in range(2):
        result = run("eval", *arguments, "--tolerance", "0.02")
        assert result.exit_code == 0, result.output
    assert "PASS onnxruntime" in result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["passed"]
    assert set(report["backends"]) == {"torch", "onnxruntime"}
    deltas = report["comparisons"]["onnxruntime"]["deltas"]
    assert all(abs(d) <= 0.02 for task in deltas.values() for d in task.values())
    assert len(deltas["segm"]) == 12
    assert report["backends"]["torch"]["detections"] > 0
    parity = json.loads((bundle / "manifest.json").read_text())["parity"]
    assert len(parity) == 1  # measured twice, recorded once
    assert parity[0]["when"] == report["when"]
    # the bundle is still whole
    assert run("eval", *arguments, "--no-record").exit_code == 0


@pytest.mark.parametrize(
    ("ap", "small", "found", "code"),
    [
        (0.5, 0.2, 10, 0),
        (0.5009, 0.2, 10, 0),  # 0.09 points off
        (0.4988, 0.2, 10, 1),  # 0.12 points off
        (0.5, -1.0, 10, 1),  # one of them saw no small objects
        (0.5, 0.2, 0, 1),  # nothing found, nothing compared
    ],
)
def test_eval_exits_by_the_tolerance(
    micro_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    ap: float,
    small: float,
    found: int,
    code: int,
) -> None:
    def measured(evaluation: Evaluation, name: str, *rest: object) -> Scores:
        values = dict.fromkeys(METRICS, 0.3)
        values |= {"AP": 0.5, "APs": 0.2} if name == "torch" else {"AP": ap, "APs": small}
        metrics = CocoMetrics(
            values={"bbox": dict.fromkeys(METRICS, 0.3), "segm": values},
            per_class={"bbox": {"circle": 0.3}, "segm": {"circle": values["AP"]}},
            images=6,
            detections=found if name == "onnxruntime" else 10,
        )
        return Scores(final=metrics, results=[[]] * 6, truth=evaluation.truth)

    monkeypatch.setattr("comask.runtime.parity.evaluation.Evaluation._score", measured)
    result = run("eval", micro_bundle, "--data", "shapes", "--limit", "6", "--no-record")
    assert result.exit_code == code, result.output


def test_eval_matches_categories_by_name(micro_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_coco(ShapesSource(num_images=4, seed=8), folder)
    file = folder / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    renumbered = {c["id"]: 100 - c["id"] for c in content["categories"]}
    for category in content["categories"]:
        category["id"] = renumbered[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = renumbered[annotation["category_id"]]
    plain, turned = tmp_path / "plain.json", tmp_path / "turned.json"
    arguments = (
        micro_bundle,
        "--data",
        folder,
        "--no-record",
        "--json",
    )
    assert run("eval", *arguments, plain).exit_code == 0
    file.write_text(json.dumps(content))
    assert run("eval", *arguments, turned).exit_code == 0
    a, b = (json.loads(p.read_text())["backends"]["onnxruntime"] for p in (plain, turned))
    assert a["segm"] == b["segm"]
    content["categories"][0]["name"] = "dodecahedron"
    file.write_text(json.dumps(content))
    result = run("eval", *arguments, turned)
    assert result.exit_code == 1
    assert "dodecahedron" in result.output


def test_real_images_odd_files_included(
    shared_data: Path, micro_bundle: Path, tmp_path: Path
) -> None:
    result = run("infer", micro_bundle, shared_data / "odd", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "19 of 23 images" in result.output
    assert result.output.count("skipped:") == 4
