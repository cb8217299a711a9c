"""Tiles in `Predictor`, in the commands, and where they are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COMMANDS, run
from PIL import Image

from comask.bundle import Bundle
from comask.cli import options
from comask.data.shapes import ShapesSource
from comask.errors import ConfigError
from comask.runtime import Predictor
from comask.runtime.tiles import joined
from comask.runtime.views import AUGMENTATIONS, LEAST_TILE, MOST_OVERLAP, Views

EXACT = ("boxes_xyxy", "scores", "labels", "mask_probs")


def shapes_folder(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    source = ShapesSource(num_images=count, seed=9)
    for index in range(count):
        Image.fromarray(source.image(index)).save(folder / f"{index}.png")
    return folder


def test_a_tile_as_large_as_the_image_changes_nothing(micro_bundle: Path) -> None:
    source = ShapesSource(num_images=3, seed=9)
    images: list[Any] = [source.image(index) for index in range(3)]
    with (
        Predictor.load(micro_bundle, "onnxruntime", device="cpu") as plain,
        Predictor.load(micro_bundle, "onnxruntime", device="cpu", tile=128) as tiled,
    ):
        expected = plain(images)
        mapped = [result.detections for result in tiled.map(images)]
        for found in (tiled(images), mapped, [tiled(image) for image in images]):
            for one, other in zip(found, expected, strict=True):
                for name in EXACT:
                    np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
                assert one.run_length_masks is None


def test_a_tiled_image_has_the_detections_of_its_tiles(micro_bundle: Path) -> None:
    image = ShapesSource(num_images=1, seed=9).image(0)
    with Predictor.load(micro_bundle, "onnxruntime", device="cpu", tile=64) as tiled:
        found = tiled(image)
        regions = tiled.views.regions(image.shape[:2])
        parts = {
            (x1, y1, x2, y2): tiled.predict_prepared([tiled.prepare(image[y1:y2, x1:x2])])[0]
            for x1, y1, x2, y2 in regions
        }
    assert len(regions) > 4
    found_in_all = sum(map(len, parts.values()))
    expected = joined(parts.pop(regions[0]), parts, tiled.preprocess.short_side / 64)
    assert found.to_coco(1) == expected.to_coco(1)
    assert 50 < len(found) < found_in_all
    assert (np.diff(found.scores) <= 0).all()


def test_the_commands(micro_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="jobs need comask[jobs]")
    photos = shapes_folder(tmp_path / "photos")
    (photos / "broken.png").write_text("no image")
    where = ("--backend", "onnxruntime", "--device", "cpu", "--tile", 64, "--tile-overlap", 0.3)
    result = run(
        "infer", micro_bundle, photos, "--output", tmp_path / "out", *where,
        "--save", "overlay,masks,coco,labels",
    )  # fmt: skip
    assert result.exit_code == 1, result.output  # of the broken file
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    with Predictor.load(micro_bundle, "onnxruntime", device="cpu", tile=64, tile_overlap=0.3) as p:
        expected = [p(photos / f"{index}.png").to_coco(index + 1) for index in range(3)]
    assert entries == [entry for of_image in expected for entry in of_image]
    for name in ("overlay.png", "mask.png", "labels.txt"):
        assert (tmp_path / f"out/1.png.{name}").exists()
    job = run(
        "job", micro_bundle, photos, "--output", tmp_path / "job", *where, "--format", "jsonl"
    )
    assert job.exit_code == 1, job.output
    lines = (tmp_path / "job/parts/part-0000000.jsonl").read_text().splitlines()
    rows = {Path(row["file"]).name: row["detections"] for row in map(json.loads, lines)}
    assert rows.pop("broken.png") is None
    for index, of_image in enumerate(expected):
        for row, entry in zip(rows[f"{index}.png"], of_image, strict=True):
            assert row["bbox"] == entry["bbox"]
            assert row["segmentation"] == entry["segmentation"]


def test_the_evaluation(micro_bundle: Path, own_truth: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = run(
        "eval", micro_bundle, "--data", own_truth, "--backend", "torch", "--backend", "onnxruntime",
        "--device", "cpu", "--tile", 64, "--no-record", "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    for backend in ("torch", "onnxruntime"):
        found = content["backends"][backend]
        assert found["first"] is None is found["plain"]
        assert found["detections"] > 100
    assert content["comparisons"]["onnxruntime"]["agreement"] > 0.99


@pytest.mark.parametrize(
    ("values", "text"),
    [(("--tile", 16), "--tile.*x>=32"), (("--tile", 64, "--tile-overlap", 1), "--tile-overlap.*0.9"),
     (("--tile", 64, "--tile-overlap", 0), "--tile-overlap.*0<x"),
     (("--tile-overlap", 0.3), "no tiles without --tile")],
)  # fmt: skip
def test_wrong_options(values: tuple[Any, ...], text: str, tmp_path: Path) -> None:
    for command in (
        ("infer", tmp_path, "photo.jpg", "--output", tmp_path / "out"),
        ("eval", tmp_path, "--data", "shapes"),
        ("job", tmp_path, "photo.jpg", "--output", tmp_path / "out"),
    ):
        result = run(*command, *values)
        assert result.exit_code == 2
        assert re.search(text, result.output), result.output


@pytest.mark.parametrize(
    ("values", "text"),
    [({"tile": 31}, "tile: expected at least 32 pixels, got 31"), ({"tile": 64.0}, "tile"),
     ({"tile_overlap": 1.0}, "tile_overlap: expected a share"), ({"tile_overlap": 0}, "above 0"),
     ({"tile_overlap": float("nan")}, "tile_overlap")],
)  # fmt: skip
def test_wrong_values(values: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        Views(**values)


def test_the_options_have_the_limits_of_the_views() -> None:
    assert options.LEAST_TILE == LEAST_TILE
    assert options.MOST_OVERLAP == MOST_OVERLAP
    assert options.AUGMENTATIONS == AUGMENTATIONS


def test_videos_and_streams_refuse_tiles(micro_bundle: Path) -> None:
    with (
        Predictor.load(micro_bundle, "onnxruntime", device="cpu", tile=64) as predictor,
        pytest.raises(ConfigError, match="tile and tta: streams and videos run each frame whole"),
    ):
        predictor.stream()


@pytest.mark.parametrize("command", ["infer", "eval", "job"])
def test_the_help_names_the_options(command: str) -> None:
    assert {"--tile", "--tile-overlap", "--tta"} <= {
        name for parameter in COMMANDS[command].params for name in parameter.opts
    }


def test_a_job_continues_with_its_own_views_only(micro_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="jobs need comask[jobs]")
    where = ("--output", tmp_path / "job", "--backend", "onnxruntime", "--device", "cpu")
    job = ("job", micro_bundle, shapes_folder(tmp_path / "photos", 1), *where)
    assert run(*job, "--tile", 64, "--tta", "vflip,flip").exit_code == 0
    assert "finished already" in run(*job, "--tile", 64, "--tta", "flip,vflip").output
    terms = json.loads((tmp_path / "job/job.json").read_text())
    assert [terms[name] for name in ("tile", "tile_overlap", "tta")] == [64, 0.2, "flip,vflip"]
    other = run(*job, "--tile", 96)
    assert other.exit_code == 1
    assert "--tile 64 there, 96 here; --tta flip,vflip there, not given here" in other.output


def test_an_evaluation_by_tiles_does_not_replace_that_of_whole_images(
    micro_bundle: Path, own_truth: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")
    where = ("--backend", "torch", "--backend", "onnxruntime", "--device", "cpu")
    page = tmp_path / "page.html"
    for views in ((), ("--tile", 64, "--report", page), ("--tta", "flip")):
        result = run("eval", bundle, "--data", own_truth, *where, *views)
        assert result.exit_code == 0, result.output
    recorded = [(entry["tile"], entry["tta"]) for entry in Bundle.open(bundle).manifest.parity]
    assert recorded[-3:] == [(None, None), (64, None), (None, "flip")]
    assert "64 pixels, overlapping by 0.2" in page.read_text()


@pytest.mark.parametrize("command", ["bench", "soak"])
def test_commands_that_time_one_view_have_no_such_options(command: str, tmp_path: Path) -> None:
    result = run(command, tmp_path, "--tile", 64)
    assert result.exit_code == 2
    assert "No such option" in result.output


def test_a_video_is_refused_before_anything_runs(micro_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="videos need comask[video]")
    result = run("infer", micro_bundle, "camera:0", "--output", tmp_path / "out", "--tile", 64)
    assert result.exit_code == 2
    assert "--tile and --tta are for images" in result.output
    assert not (tmp_path / "out").exists()
