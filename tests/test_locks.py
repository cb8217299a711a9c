"""Locks: one process at a time where the file system has them, a warning where it has none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MICRO, run, settings

from comask import files
from comask.bundle import scratch_folder
from comask.files import locked

WITHOUT_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL]


@pytest.fixture(params=WITHOUT_LOCKS, ids=lambda code: errno.errorcode[code])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A file system that answers each attempt to lock with an error."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files._warn.cache_clear()
    return request.param


HOLD = """
import sys, time
from pathlib import Path
from comask.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_waited_for_or_told_of(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError), locked(tmp_path, patience=0.3):
        pass
    said: list[float] = []

    def waiting() -> None:
        said.append(time.monotonic())
        other.kill()  # a lock ends with its process

    with locked(tmp_path, waiting=waiting) as held:
        assert held
    assert len(said) == 1
    other.wait()


def test_without_locks_a_warning_says_so_once(
    no_locks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        with locked(tmp_path, patience=0) as held:
            assert not held
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path} cannot be locked ({os.strerror(no_locks)})" in message
    assert "make sure that no other process writes there" in message


def test_other_errors_of_locking_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass


def test_without_locks_what_may_be_anothers_stays(no_locks: int, tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "bundle", tmp_path) as first:
        (first / "file").touch()
        with scratch_folder(tmp_path / "bundle", tmp_path) as second:
            assert second != first
            assert (first / "file").exists()


@pytest.mark.slow
def test_training_and_export_do_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files._warn.cache_clear()
    output = tmp_path / "run"
    trained = run("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", output,
                  *settings(*MICRO))  # fmt: skip
    assert trained.exit_code == 0, trained.output
    bundle = tmp_path / "bundle"
    exported = run("export", output / "checkpoint-best.pt", "--output", bundle)
    assert exported.exit_code == 0, exported.output
    evaluated = run("eval", bundle, "--data", "shapes", "--limit", "4", "--tolerance", "1")
    assert evaluated.exit_code == 0, evaluated.output  # which records in the manifest
