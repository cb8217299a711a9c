"""`--runner ray` as a whole: killed by SIGKILL, continued, equal to the command without it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run
from PIL import Image

from comask.data.shapes import ShapesSource

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'comask[jobs]'", allow_module_level=True)

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-c", "from comask.cli.job import main; main()"]


def test_a_killed_ray_job_continues_and_gives_what_the_command_gives(
    micro_bundle: Path, tmp_path: Path
) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "job"
    pictures.mkdir()
    source = ShapesSource(num_images=12, seed=4)
    for index in range(12):
        Image.fromarray(source.image(index)).save(pictures / f"{index:02}.png")
    (pictures / "05.png").write_bytes(b"")
    plain = run("infer", micro_bundle, pictures, "--output", tmp_path / "plain", "--save", "coco")
    assert plain.exit_code == 1

    job = [
        *COMMAND, str(micro_bundle), str(pictures), "--output", str(output), "--runner", "ray",
        "--actors", "1", "--shard", "2", "--format", "jsonl",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(job, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(output.glob("done/part-*.json")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()
    done = len(list(output.glob("done/part-*.json")))
    assert 1 <= done < 6

    ended = subprocess.run(job, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert "continues: " in ended.stderr
    assert "11 of 12 images" in ended.stdout
    assert "05.png: the file is empty" in ended.stderr
    assert "WARNING" not in ended.stderr  # Ray's own words
    rows = [
        json.loads(line)
        for part in sorted((output / "parts").glob("*.jsonl"))
        for line in part.read_text().splitlines()
    ]
    assert [row["file"] for row in rows] == sorted(str(path) for path in pictures.iterdir())
    assert [Path(row["file"]).name for row in rows if row["error"]] == ["05.png"]
    images = json.loads((tmp_path / "plain" / "images.json").read_text())
    detections = json.loads((tmp_path / "plain" / "detections.json").read_text())
    expected = [
        [dict(d, image_id=None) for d in detections if d["image_id"] == image["id"]]
        for image in images
    ]
    for row in rows:
        for detection in row["detections"] or ():
            del detection["category"]
            detection["image_id"] = None
    assert [row["detections"] for row in rows if not row["error"]] == expected
    assert sum(map(len, expected)) > 0
