"""`benchmarks/vs_peers.py` on a tiny bundle: the work is equal, the report whole, refusals one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from comask.errors import ComaskError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ("torchvision eager", "torchvision onnxruntime", "comask torch", "comask onnxruntime")


def vs_peers(bundle: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    chosen = [part for name in (*NAMES, "comask tensorrt:fp16") for part in ("--only", name)]
    command = [sys.executable, BENCHMARKS / "vs_peers.py", "--bundle", bundle, *chosen, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd="/")


@pytest.fixture
def report_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers_report

    return peers_report


@pytest.mark.slow
def test_a_small_run_measures_all(micro_bundle: Path, tmp_path: Path) -> None:
    page, picture, file = tmp_path / "page.md", tmp_path / "peers.svg", tmp_path / "peers.json"
    page.write_text("before\n<!-- peers table -->\nold\n<!-- end of peers table -->\nafter\n")
    result = vs_peers(
        micro_bundle, "--sizes", 64, "--proposals", 40, "--detections", "6,3", "--runs", 2,
        "--json", file, "--plot", picture, "--docs", page,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text())
    measured = [*NAMES, *(["comask tensorrt:fp16"] if report["machine"]["gpu"] else [])]
    assert list(report["contestants"]) == measured
    assert [case["detections"] for case in report["cases"]] == [6, 3]
    for case in report["cases"]:
        assert case["canvas"] == [64, 128]
        assert case["rows"]["torchvision eager"]["ratio"] == [1, 1, 1]
        for row in case["rows"].values():
            assert row["sum"] > row["network"] > 0
            assert row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2]
    # each of the 12544 values of 40 proposals meets 1024 neurons, and that is but one layer
    assert report["models"]["torchvision eager"]["gflop"]["64x128"] > 2 * 40 * 12544 * 1024 / 1e9
    assert all(entry["memory"] > entry["files"] > 0 for entry in report["contestants"].values())
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end of peers table -->\nafter\n")
    assert "old" not in text
    assert result.stdout.strip() in text
    assert "<svg" in picture.read_text()


def test_more_than_a_bundle_can_find_is_refused(micro_bundle: Path) -> None:
    result = vs_peers(micro_bundle, "--sizes", 64, "--detections", 200)
    assert result.returncode == 1
    assert "has 16 detections, and --detections asks for 200" in result.stderr
    assert "Traceback" not in result.stderr
    assert vs_peers(micro_bundle, "--sizes", "64,x").returncode == 2


def test_ratio_is_that_of_the_medians(report_module: ModuleType) -> None:
    rng = np.random.default_rng(0)
    reference = rng.uniform(0.9, 1.1, (9, 3))
    row: dict[str, Any] = report_module.row(reference / 2, reference)
    assert row["network_ratio"] == [2, 2, 2]  # turns are drawn together, so what is shared cancels
    assert row["sum"] == pytest.approx(1000 * np.median(reference.sum(1)) / 2)
    middle, low, high = report_module.ratio(reference[:, 0], rng.uniform(0.4, 0.6, 9))
    assert low < middle < high


def test_a_page_without_markers_is_refused(report_module: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- end of peers table --> <!-- peers table -->")
    with pytest.raises(ComaskError, match="expected <!-- peers table -->"):
        report_module.check_page(page)
