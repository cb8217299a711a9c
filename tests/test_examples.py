"""Examples that no other test runs."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from comask.evaluate import METRICS
from comask.presets import PRESETS

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_tables_are_written_beside_the_papers_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("tables", EXAMPLES / "reproduce_tables.py")
    assert spec
    assert spec.loader
    tables = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tables", tables)
    spec.loader.exec_module(tables)
    commands: list[list[str]] = []

    def trained(command: list[str], *, check: bool) -> None:
        assert check
        commands.append(command)
        output = Path(command[command.index("--output") + 1])
        output.mkdir(parents=True, exist_ok=True)
        with (output / "eval.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "epoch", "stage", "task", *METRICS])
            for stage in ("final", "first"):
                for task, ap in (("bbox", 0.9), ("segm", 0.333 if stage == "final" else 0.1)):
                    writer.writerow([9, 1, stage, task, *[ap] * len(METRICS)])

    monkeypatch.setattr(subprocess, "run", trained)
    arguments = ["/data/coco", str(tmp_path), "--processes", "4", "--set", "train.batch_size=16"]
    result = CliRunner().invoke(tables.main, arguments)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "tables.md").read_text().splitlines()[4:]
    assert len(lines) == len(tables.ROWS) == 7
    assert "| 1 | CoMask, ResNet-50 | 33.3 / 37.7 |" in lines[0]
    assert {row.preset for row in tables.ROWS} <= set(PRESETS)
    for command in commands:
        assert "--nproc-per-node=4" in command
        assert command[-2:] == ["--set", "train.batch_size=16"]
        assert "--resume" in command
