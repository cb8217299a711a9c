"""`make gpu-check`: its table where there is no GPU, its rehearsal, and how a row fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from comask.errors import KernelError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT))
    import rows

    return rows


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_without_a_gpu_every_row_says_so(tmp_path: Path) -> None:
    result = gpu_check("--json", tmp_path / "check.json")
    content = json.loads((tmp_path / "check.json").read_text())
    if content["machine"]["capability"] is not None:
        pytest.skip("this machine has a GPU: run make gpu-check")
    assert result.returncode == 0, result.stderr
    assert {row["status"] for row in content["rows"]} == {"unavailable"}
    assert all("driver" in row["note"] for row in content["rows"])
    assert "0 passed, 0 failed" in result.stdout


def test_the_file_is_what_the_page_describes(tmp_path: Path) -> None:
    gpu_check("--only", "RoIAlign", "--json", tmp_path / "check.json")
    content = json.loads((tmp_path / "check.json").read_text())
    page = (ROOT / "docs" / "verified" / "README.md").read_text()
    assert content["schema_version"] == 1
    for key in (*content, *content["rows"][0]):
        assert f"`{key}`" in page, key
    assert content["machine"]["python"] == sys.version.split()[0]


def test_a_rehearsal_runs_the_kernels_on_the_cpu(tmp_path: Path) -> None:
    result = gpu_check("--rehearse", "--only", "equals torchvision", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["rehearsal"] is True
    assert [row["status"] for row in content["rows"]] == ["PASS"] * 4
    assert all(0 <= row["value"] <= row["most"] for row in content["rows"])


@pytest.mark.parametrize(
    ("value", "least", "most", "status"),
    [(3.0, 3.0, None, "PASS"), (2.9, 3.0, None, "FAIL"), (0.0, None, 0.0, "PASS"),
     (1e-9, None, 0.0, "FAIL"), (math.nan, None, 1.0, "FAIL"), (math.nan, None, None, "FAIL"),
     (5.0, None, None, "PASS")],
)  # fmt: skip
def test_bars(
    rows: ModuleType, value: float, least: float | None, most: float | None, status: str
) -> None:
    row = rows.run_check(
        "g", "n", lambda context: rows.Figure(value=value, least=least, most=most), None
    )
    assert row.status == status


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("wrong\nnumbers"), "FAIL"), (AssertionError("no"), "FAIL"),
     (ModuleNotFoundError("No module named 'pycuda'"), "unavailable"),
     (KernelError("no CUDA compiler"), "unavailable")],
)  # fmt: skip
def test_a_check_that_raises_is_a_row(rows: ModuleType, error: Exception, status: str) -> None:
    def check(context: object) -> None:
        raise error

    row = rows.run_check("g", "n", check, None)
    assert row.status == status
    assert " ".join(str(error).split()) in row.note
    assert "\n" not in row.note
