"""What `comask infer` writes for other tools."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import run
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from comask.data.shapes import ShapesSource


def test_infer_writes_for_other_tools(micro_bundle: Path, tmp_path: Path) -> None:
    """The files have the detections from the threshold on, also without `coco`."""
    source = ShapesSource(num_images=2, seed=4)
    for index, name in enumerate(("a.png", "b/c.png")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.image(index)).save(tmp_path / "photos" / name)
    output, pictures = tmp_path / "out", tmp_path / "photos" / "**" / "*.png"
    assert run("infer", micro_bundle, pictures, "--output", tmp_path / "all").exit_code == 0
    found = json.loads((tmp_path / "all" / "detections.json").read_text())
    middle = sorted(entry["score"] for entry in found)[len(found) // 2]
    kept = [entry for entry in found if entry["score"] >= middle]
    seen = [entry for entry in kept if coco_mask.area(entry["segmentation"])]
    result = run("infer", micro_bundle, pictures, "--output", output, "--save",
                 "dataset,labelstudio", "--threshold", middle)  # fmt: skip
    assert result.exit_code == 0, result.output
    hidden = f"left out for other tools: {len(kept) - len(seen)} detections whose mask has no pixel"
    assert (hidden in result.output) == (len(kept) > len(seen))
    written = {path.name for path in output.iterdir()}
    assert written == {"dataset.json", "labelstudio.json", "labelstudio.xml"}
    read = COCO(str(output / "dataset.json")).dataset
    assert [image["file_name"] for image in read["images"]] == ["a.png", "b/c.png"]
    masks = [annotation["segmentation"] for annotation in read["annotations"]]
    assert masks == [entry["segmentation"] for entry in seen]
    tasks = json.loads((output / "labelstudio.json").read_text())
    regions = [region for task in tasks for region in task["predictions"][0]["result"]]
    assert [region["score"] for region in regions] == [entry["score"] for entry in seen]


def test_a_folder_where_a_file_goes_is_refused(micro_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "dataset.json").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    result = run("infer", micro_bundle, tmp_path / "a.png", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "dataset.json in it is a folder; remove it" in result.output
