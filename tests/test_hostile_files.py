"""Weights made to do harm, full disks and folders without permission: one line, and nothing is lost."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MICRO, run, settings

from comask.errors import CheckpointError, one_line
from comask.training.checkpoint import load_checkpoint, model_from_checkpoint
from comask.training.weight_files import read_weights


class Malicious:
    """Its unpickling would make a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def compressed(path: Path) -> bytes:
    """A checkpoint of a hundred megabytes more than its file has."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(path) as whole,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
        root = whole.infolist()[0].filename.partition("/")[0]
        packed.writestr(f"{root}/data/99999", bytes(100 * 2**20))
    return buffer.getvalue()


def safetensors(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def test_no_loader_runs_what_a_file_holds(micro_run: Path, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    evil = Malicious(trace)
    good = torch.load(micro_run / "checkpoint-last.pt", weights_only=True)
    for write in (
        lambda: torch.save(evil, path),
        lambda: torch.save(good | {"model": evil}, path),
        lambda: torch.save(good | {"optimizer": {"state": evil}}, path),
        lambda: torch.save(evil, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(evil)),
    ):
        write()
        for load in (load_checkpoint, read_weights):
            with pytest.raises(CheckpointError) as caught:
                load(path)
            assert "weights_only" not in str(caught.value)  # PyTorch's advice how to run it
            assert "\n" not in str(caught.value)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    path.replace(run_folder / "checkpoint-last.pt")
    for arguments in (
        ("export", run_folder / "checkpoint-last.pt", "--output", tmp_path / "b"),
        ("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", run_folder, "--resume",
         *settings(*MICRO)),
        ("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "other",
         *settings(*MICRO, f"train.weights={run_folder / 'checkpoint-last.pt'}")),
    ):  # fmt: skip
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert len(result.output.splitlines()) == 1, result.output
    assert not trace.exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{" + bytes(100),
        safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        b"",
        b"PK\x03\x04" + bytes(40),
    ],
    ids=["huge header", "huge tensor", "empty", "cut zip"],
)
def test_files_that_promise_too_much(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    for load in (load_checkpoint, read_weights):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "w")
        assert one_line(caught.value) == str(caught.value)


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(
    micro_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "bomb.pt").write_bytes(compressed(micro_run / "checkpoint-last.pt"))
    for load in (load_checkpoint, read_weights):
        with pytest.raises(CheckpointError, match=r"unpacks to \d+ bytes"):
            load(tmp_path / "bomb.pt")


def test_pipes_and_folders_are_no_checkpoints(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", tmp_path):
        for load in (load_checkpoint, read_weights):
            with pytest.raises(CheckpointError, match="is not a file"):
                load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": 3}, "expected an object, got 3"),
        ({"categories": 3}, "missing or wrong"),
        ({"categories": [([1], "a")] * 8}, "categories.id: expected an integer or a string"),
        ({"model": 3}, "model is of type int"),
        ({"optimizer": 7}, "optimizer is of type int"),
        ({"step": "a"}, "step is of type str"),
        ({"format": torch.zeros(3)}, "this comask reads"),
        ({"format": 3}, "has checkpoint format 3"),
        ({"model": {"x": 3}, "ema": None}, "do not fit"),
        ({"model": {"backbone.conv1.weight": 3}, "ema": None}, "do not fit"),
        (
            {"model": {"backbone.conv1.weight": torch.zeros(1).expand(10**6, 10**6)}, "ema": None},
            "do not fit",
        ),
    ],
)
def test_altered_checkpoints(
    micro_run: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    good = torch.load(micro_run / "checkpoint-last.pt", weights_only=True)
    torch.save(good | changes, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=words):
        model_from_checkpoint(load_checkpoint(tmp_path / "c.pt"))


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.path.insert(0, sys.argv[2])
from comask.cli.main import main
main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("largest", "arguments"),
    [
        (50_000, ("export", "CHECKPOINT", "--output", "OUT/bundle", "--limit", "1")),
        (2000, ("shapes", "OUT/set", "--count", "2")),
    ],
)
def test_files_that_cannot_grow_leave_nothing_half_written(
    micro_run: Path, tmp_path: Path, largest: int, arguments: tuple[str, ...]
) -> None:
    places = {"CHECKPOINT": str(micro_run / "checkpoint-last.pt")}
    given = [places.get(text, text).replace("OUT", str(tmp_path)) for text in arguments]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(largest), str(Path(__file__).parent), *given],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_results_that_cannot_be_written(micro_bundle: Path) -> None:
    result = run("eval", micro_bundle, "--data", "shapes", "--limit", 1, "--backend", "torch",
                 "--no-record", "--json", "/dev/full")  # fmt: skip
    assert result.exit_code == 1
    assert "No space left on device" in result.output.splitlines()[-1]


def test_folders_without_permission(micro_bundle: Path, tmp_path: Path) -> None:
    for name, mode in (("unread", 0o000), ("unwritten", 0o500)):
        (tmp_path / name).mkdir(mode=mode)
    if os.access(tmp_path / "unread", os.R_OK):
        pytest.skip("root may read and write everything")
    try:
        for arguments in (
            (tmp_path / "unread", "--output", tmp_path / "out"),
            (Path(__file__), "--output", tmp_path / "unwritten" / "out"),
        ):
            result = run("infer", micro_bundle, *arguments)
            assert result.exit_code == 1
            assert "Permission denied" in result.output
            assert "Traceback" not in result.output
    finally:
        (tmp_path / "unread").chmod(0o700)
