"""Terminals of other encodings, and names that begin with a dash."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMANDS, run
from PIL import Image
from video_clips import pictures

from comask.cli.command import _in_other_characters


def in_terminal(
    encoding: str, command: str, *arguments: object
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", "from comask.cli.main import main; main()", command, *map(str, arguments)],
        env=os.environ | {"PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"},
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown_in_any_encoding(command: str, encoding: str) -> None:
    shown = in_terminal(encoding, command, "--help")
    assert shown.returncode == 0, shown.stderr
    # click takes a terminal of ASCII for one that is set up wrongly, and writes UTF-8
    text = shown.stdout.decode("utf-8" if encoding == "ascii" else encoding)
    assert "Usage: " in text
    assert "--help" in text.split("Options:")[1]
    if command == "infer":
        shown_as = {"latin-1": "INPUT...", "cp1252": "INPUT…"}.get(encoding, "INPUT…")
        assert shown_as in text


def test_what_an_encoding_lacks_is_written_in_ascii() -> None:
    codecs.register_error("comask", _in_other_characters)
    written = "≤ 3 … 子 Ä".encode("latin-1", "comask")
    assert written == rb"<= 3 ... \u5b50 " + "Ä".encode("latin-1")


def test_names_and_json_are_written_to_a_terminal_that_lacks_their_characters(
    micro_bundle: Path, tmp_path: Path
) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "叶.png")
    (tmp_path / "子.png").write_bytes(b"")
    for encoding in ("cp1252", "latin-1"):
        shown = in_terminal(encoding, "infer", micro_bundle, tmp_path, "--output", tmp_path / "out",
                            "--save", "coco", "--json", "-")  # fmt: skip
        assert shown.returncode == 1, shown.stderr
        (failure,) = json.loads(shown.stdout)["failures"]
        assert failure["file"] == str(tmp_path / "子.png")
        assert b"skipped: " in shown.stderr
        assert rb"\u5b50.png: the file is empty" in shown.stderr


def test_a_file_that_begins_with_a_dash_is_a_file(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "-photo.png")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "--json.png")
    monkeypatch.chdir(tmp_path)
    result = run("infer", micro_bundle, "-photo.png", "--json.png", "--output", "-out",
                 "--save", "coco")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 of 2 images" in result.output
    assert (tmp_path / "-out" / "detections.json").exists()
    result = run("infer", micro_bundle, "-missing.png", "--output", "o")
    assert result.exit_code == 2
