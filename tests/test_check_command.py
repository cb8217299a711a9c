"""`comask check`: what it counts, and when it exits with 1."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import run


def test_counts_are_those_of_the_annotations(tmp_path: Path) -> None:
    assert run("shapes", tmp_path / "set", "--count", 12, "--seed", 3).exit_code == 0
    listed = json.loads((tmp_path / "set/annotations/instances.json").read_text())
    report = tmp_path / "r.json"
    done = run("check", tmp_path / "set", "--json", report)
    assert done.exit_code == 0, done.output
    assert "the whole data set is used" in done.output
    found = json.loads(report.read_text())
    objects = [a for a in listed["annotations"] if not a["iscrowd"]]
    assert (found["images"], found["objects"]) == (12, len(objects))
    assert found["crowds"] == len(listed["annotations"]) - len(objects)
    by_id = {category["id"]: category for category in found["categories"]}
    for category in listed["categories"]:
        own = [a for a in objects if a["category_id"] == category["id"]]
        counted = by_id[category["id"]]
        assert counted["name"] == category["name"]
        assert counted["objects"] == len(own)
        assert counted["images"] == len({a["image_id"] for a in own})
    assert found["without_objects"] == 12 - len({a["image_id"] for a in objects})


def test_unsound_parts_are_told_and_the_exit_code_is_1(tmp_path: Path) -> None:
    assert run("shapes", tmp_path / "set", "--count", 4).exit_code == 0
    file = tmp_path / "set/annotations/instances.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [1, 2, 0, 3]
    content["categories"].append({"id": 99, "name": "unused"})
    file.write_text(json.dumps(content))
    done = run("check", tmp_path / "set")
    assert done.exit_code == 1
    assert "data: 1 box without area" in done.output
    assert "without an object (not trained): " in done.output
    assert "unused: " not in done.output
    assert done.output.endswith("a part is left out or changed: see the lines above\n")


def test_shapes_is_sound_and_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    assert run("check", "shapes").exit_code == 0
    done = run("check", tmp_path / "no")
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
