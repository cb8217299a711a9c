"""`comask train` and `comask shapes` as a user types them: data sets, sound, unsound and none."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from conftest import MICRO, run, settings

from comask.data.coco import write_coco
from comask.data.shapes import ShapesSource
from comask.training.record import read_rows


def test_shapes_writes_a_set_that_trains(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    assert run("shapes", folder, "--count", "12", "--seed", "5").exit_code == 0
    assert run("shapes", folder, "--count", "12").exit_code == 1
    result = run(
        "train", "--data", folder, "--preset", "shapes-tiny", "--output", tmp_path / "run",
        *settings(*MICRO, "train.max_steps=1"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "11 training images, 1 for validation, 8 classes" in result.output


def test_train_refuses_in_one_line(tmp_path: Path) -> None:
    listed = tmp_path / "set" / "annotations" / "instances.json"
    (tmp_path / "set" / "images").mkdir(parents=True)
    listed.parent.mkdir()
    listed.write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    for arguments, code, words in [
        (("--data", tmp_path, "--output", tmp_path / "r"), 1, "no data set found"),
        (("--data", tmp_path / "no", "--output", tmp_path / "r"), 1, "no: no such folder"),
        (("--data", tmp_path / "set" / "images", "--output", tmp_path / "r"), 1,
         f"data set {tmp_path / 'set'}; give that folder"),
        (("--data", listed, "--output", tmp_path / "r"), 1, f"{listed}: no image of the data set"),
        (("--data", tmp_path / "set", "--output", tmp_path / "r"), 1, "set: no image of the"),
        (("--data", "shapes", "--output", tmp_path / "r", "--set", "train.epochs", "1"), 2,
         "--set takes key=value"),
        (("--data", "shapes", "--output", tmp_path / "r", "--set", "model.channel=3"), 1,
         "did you mean model.channels"),
        (("--data", "shapes", "--output", tmp_path / "r", "--preset", "big"), 2, "comask-r50"),
        (("--data", "shapes"), 2, "missing option --output"),
        (("--data", "shapes", "--output", tmp_path / "r", "--resume", "--eval-only"), 2, "one of"),
        (("--data", "shapes", "--output", tmp_path / "r", "--eval-only"), 1, "no such checkpoint"),
        (("--data", "shapes", "--output", tmp_path / "r",
          "--set", "train.weights=/none.pth"), 1, "cannot be loaded"),
        (("--data", "shapes", "--output", tmp_path / "r", "--set", "model.num_classes=3"), 1,
         "8 categories"),
    ]:  # fmt: skip
        result = run("train", *arguments)
        assert (result.exit_code, words in result.output) == (code, True), result.output
        assert "Traceback" not in result.output
        assert not (tmp_path / "r").exists()  # nothing empty is left


def test_train_reports_unsound_data_and_trains_on_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_coco(ShapesSource(num_images=12, seed=5), folder)
    file = folder / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 77
    content["annotations"][1]["bbox"][2] = 0
    file.write_text(json.dumps(content))
    next((folder / "images").iterdir()).unlink()
    result = run(
        "train", "--data", folder, "--preset", "shapes-tiny", "--output", tmp_path / "run",
        *settings(*MICRO, "train.max_steps=1", "train.evaluate_every=0"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "data: 1 image without a file (left out)" in result.output
    assert "10 training images, 1 for validation" in result.output
    for words in ("unknown categor", "without area"):
        assert words in result.output


def test_seeds_tell_how_far_ap_scatters(tmp_path: Path) -> None:
    output = tmp_path / "runs"
    command = (
        "train", "--data", "shapes", "--preset", "shapes-tiny", "--output", output,
        *settings(*MICRO, "train.max_steps=1", "train.seed=4"),
    )  # fmt: skip
    result = run(*command, "--seeds", 3)
    assert result.exit_code == 0, result.output
    assert "over 3 seeds, mean ± deviation" in result.output
    runs = [output / f"seed-{seed}" for seed in (4, 5, 6)]
    content = json.loads((output / "seeds.json").read_text())
    assert content["runs"] == [folder.name for folder in runs]
    for task, name in (("bbox", "box"), ("segm", "mask")):
        values = [
            float(row["AP"]) * 100
            for folder in runs
            for row in read_rows(folder / "eval.csv")
            if (row["stage"], row["task"]) == ("final", task)
        ]
        entry = content["points"][f"{name} AP"]
        assert entry["values"] == pytest.approx(values, abs=1e-3)
        assert entry["mean"] == pytest.approx(statistics.fmean(values), abs=1e-3)
        assert entry["deviation"] == pytest.approx(statistics.stdev(values), abs=1e-3)
    weights = {folder: (folder / "checkpoint-last.pt").read_bytes() for folder in runs}
    assert len(set(weights.values())) == 3
    again = run(*command, "--seeds", 4, "--resume")  # those that are finished stay
    assert again.exit_code == 0, again.output
    assert {folder: (folder / "checkpoint-last.pt").read_bytes() for folder in runs} == weights
    assert (output / "seed-7" / "checkpoint-last.pt").exists()


def test_seeds_need_images_that_are_the_same_for_all(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert run("shapes", whole, "--count", 4).exit_code == 0
    for arguments, words in [
        (
            ("--data", whole, "--seeds", 2),
            f"--seeds needs --val: {whole} has no part for validation",
        ),
        (("--data", "shapes", "--seeds", 2, "--eval-only"), "--seeds trains and --eval-only does"),
        (("--data", "shapes", "--seeds", 1), "2"),
    ]:
        result = run("train", "--output", tmp_path / "r", *arguments)
        assert result.exit_code == 2
        assert words in result.output


def test_seeds_take_the_datas_own_part_for_validation(tmp_path: Path) -> None:
    parted = tmp_path / "parted"
    (parted / "annotations").mkdir(parents=True)
    for part, count in (("train2017", 8), ("val2017", 3)):
        assert run("shapes", tmp_path / part, "--count", count).exit_code == 0
        (tmp_path / part / "images").rename(parted / part)
        file = tmp_path / part / "annotations" / "instances.json"
        file.rename(parted / "annotations" / f"instances_{part}.json")
    result = run(
        "train", "--data", parted, "--preset", "shapes-tiny", "--output", tmp_path / "runs",
        "--seeds", 2, *settings(*MICRO, "train.max_steps=1"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.output.count("8 training images, 3 for validation") == 2
    assert "over 2 seeds, mean ± deviation" in result.output
