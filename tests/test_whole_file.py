"""Files are whole or as they were, whatever ends the one who writes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from video_clips import decoded, make_clip, pictures

from comask.bundle import scratch_folder
from comask.files import part_of, whole_file, write_whole
from comask.runtime.video import OverlayWriter, VideoSource
from comask.structures import Detections


def test_an_error_leaves_the_previous_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, b"before")

    def fail() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            file.flush()
            assert path.read_bytes() == b"before"
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"before"


WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from comask.files import whole_file
with whole_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, b"before")
    died = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(path)])
    assert died.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"before"
    assert part_of(path).read_bytes() == b"half"
    write_whole(path, b"after", durable=False)
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "no" / "where", b"")
    assert caught.value.filename == str(tmp_path / "no" / "where")


HOLD = """
import sys
from pathlib import Path
from comask.bundle import scratch_folder
with scratch_folder(Path(sys.argv[1]), Path(sys.argv[1]).parent) as folder:
    (folder / "file").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_folders_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    bundle = tmp_path / "my[1]bundle"
    other = tmp_path / ".my[1]bundle.old"
    other.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(bundle)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    with scratch_folder(bundle, tmp_path) as own:
        assert (left / "file").exists()
        holder.kill()
        holder.communicate()
        with scratch_folder(bundle, tmp_path) as second:
            assert not left.exists()
            assert own.exists()
            assert second.exists()
    assert list(tmp_path.iterdir()) == [other]


def test_an_overlay_video_is_there_when_it_is_complete(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(80), audio=None)
    with VideoSource(clip) as source:
        writer = OverlayWriter(tmp_path / "o", source)
        for frame in source:
            writer.add(frame, nothing(frame.pixels), None)
        assert not writer.path.exists()
        assert part_of(writer.path).exists()
        writer.close()
    assert not part_of(writer.path).exists()
    assert len(decoded(writer.path)) == 80


def nothing(image: NDArray[np.uint8]) -> Detections:
    return Detections(
        boxes_xyxy=np.zeros((0, 4), np.float32),
        scores=np.zeros(0, np.float32),
        labels=np.zeros(0, np.int64),
        mask_probs=np.zeros((0, 28, 28), np.float32),
        image_size=(image.shape[0], image.shape[1]),
    )
