"""Runs `comask eval` on a few images, and edits bundles for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import run
from pycocotools import mask as coco_mask

IMAGES = 3


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def evaluate(bundle: Path, tmp_path: Path, *options: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and page of a small evaluation."""
    page, report = tmp_path / "report.html", tmp_path / "report.json"
    result = run(
        "eval", bundle, "--data", "shapes", "--limit", IMAGES, "--json", report, "--report", page,
        *options,
    )  # fmt: skip
    assert report.exists(), result.output
    return result.exit_code, json.loads(report.read_text()), page.read_text()


def entry(x: int, score: float, label: int = 1) -> dict[str, Any]:
    bitmap = np.zeros((40, 200), np.uint8, order="F")
    bitmap[5:25, x : x + 20] = 1
    rle = coco_mask.encode(bitmap)
    rle["counts"] = rle["counts"].decode()
    return {"bbox": [x, 5, 20, 20], "score": score, "category_id": label, "segmentation": rle}
