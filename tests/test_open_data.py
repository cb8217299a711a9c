"""What `--data` names."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from conftest import run

from comask.data.open_data import open_source
from comask.data.shapes import ShapesSource

WORDS = "write ./shapes for that"


def opened(data: str) -> object:
    return open_source(data, "val", shapes_images=7, shapes_seed=1)


def test_shapes_are_never_the_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(opened("shapes"), ShapesSource)
    assert caplog.text == ""
    assert run("shapes", "shapes", "--count", 2, "--seed", 3).exit_code == 0
    for _ in range(2):  # said once
        found = opened("shapes")
        assert isinstance(found, ShapesSource)
        assert len(found) == 7
    assert [(r.levelno, WORDS in r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, True)
    ]
    for folder in ("./shapes", str(tmp_path / "shapes")):
        found = opened(folder)
        assert not isinstance(found, ShapesSource)
        assert len(found) == 2  # type: ignore[arg-type]


def test_the_record_tells_them_apart(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("shapes", "shapes", "--count", 2, "--seed", 3).exit_code == 0
    for data in ("shapes", "./shapes"):
        run("eval", micro_bundle, "--data", data, "--limit", 1, "--backend", "torch",
            "--backend", "onnxruntime", "--no-record", "--json", "r.json")  # fmt: skip
        assert json.loads(Path("r.json").read_text())["data"] == data
