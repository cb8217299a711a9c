"""Processes that load images: what goes wrong in them is one line, and none of them outlives a run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MICRO, run, settings
from hypothesis import given
from hypothesis import strategies as st
from strategies import FEW

from comask.config import DataConfig, PreprocessConfig
from comask.data.layouts import read_data_set
from comask.data.loading import Batch, load_batches
from comask.data.shapes import ShapesSource
from comask.data.training_set import Item, Key, TrainingSet
from comask.errors import TrainingError
from comask.segmentation import read_segmentation

COMMAND = [sys.executable, "-c", "from comask.cli.train import main; main()"]


class Failing(TrainingSet):
    """Does something else than to load image 3."""

    instead: Callable[[], None]

    def __getitem__(self, key: Key) -> Item:
        if key[1] == 3:
            type(self).instead()
        return super().__getitem__(key)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def load(dataset: TrainingSet, workers: int) -> list[Batch]:
    batches = [[(0, index), (0, index + 1)] for index in range(0, 8, 2)]
    with load_batches(dataset, batches, workers=workers) as loaded:
        return list(loaded)


def failing(monkeypatch: pytest.MonkeyPatch, instead: Callable[[], None]) -> TrainingSet:
    monkeypatch.setattr(Failing, "instead", staticmethod(instead), raising=False)
    size = PreprocessConfig(short_side=32, max_side=64)
    source = ShapesSource(num_images=8, seed=0)
    return Failing(source, list(range(8)), size, config=DataConfig(flip_probability=0.0), seed=0)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("two\nlines"), "000004.png: cannot be loaded: RuntimeError: two lines"),
        (AssertionError(), "000004.png: cannot be loaded: AssertionError: AssertionError"),
        (MemoryError("12 TiB"), "000004.png: not enough memory to load its batch (12 TiB): lower data"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "000004.png: not enough memory"),
        (RuntimeError("unable to allocate shared memory(shm)"), "/dev/shm is full"),
    ],
)  # fmt: skip
def test_a_failure_names_the_image_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, workers: int, error: Exception, words: str
) -> None:
    data = failing(monkeypatch, raising(error))
    with pytest.raises(TrainingError) as caught:
        load(data, workers)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert any("Traceback" in note for note in caught.value.__notes__)  # for --verbose
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        (kill(signal.SIGKILL), "SIGKILL, most likely because memory ran out: go on with --resume --set "
                               "data.workers=1"),
        (kill(signal.SIGBUS), "SIGBUS: /dev/shm is full"),
        (kill(signal.SIGSEGV), "SIGSEGV: go on with --resume, or with data.workers=0"),
        (lambda: os._exit(3), "exit code 3"),
    ],
)  # fmt: skip
def test_a_process_that_is_gone_is_told_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, instead: Callable[[], None], words: str
) -> None:
    with pytest.raises(TrainingError, match="a process that loads images was ended by") as caught:
        load(failing(monkeypatch, instead), workers=2)
    assert words in str(caught.value)
    assert not multiprocessing.active_children()


def test_whatever_leaves_the_block_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where one hangs in an image, and where the error that leaves it is kept."""
    data = failing(monkeypatch, lambda: time.sleep(600))
    kept = None
    started = time.monotonic()
    try:
        with load_batches(data, [[(0, 0)], [(0, 3)]], workers=2) as loaded:
            next(loaded)
            raise ValueError("of the one who uses the batches")
    except ValueError as error:
        kept = error
    assert kept is not None
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 30


def test_a_full_dev_shm_is_an_error_and_no_wait_without_end(tmp_path: Path) -> None:
    """A batch is handed over in shared memory, of which containers have 64 MiB."""
    script = (
        f'mount -t tmpfs -o size=200k tmpfs /dev/shm && exec {sys.executable} -c "$1" "${{@:2}}"'
    )
    arguments = [
        "--data", "shapes", "--preset", "shapes-tiny", "--output", str(tmp_path / "run"),
        *settings(*MICRO, "data.workers=2", "data.shapes_train=16"),
    ]  # fmt: skip
    try:
        trial = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare, of util-linux")
    if trial.returncode:
        pytest.skip("needs the right to mount: run as root")
    ended = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "bash", COMMAND[2], *arguments],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "/dev/shm is full" in ended.stderr
    assert ended.stderr.count("error: ") == 1


def test_the_command_ends_at_once_when_one_of_its_processes_is_killed(tmp_path: Path) -> None:
    arguments = [
        "--data", "shapes", "--preset", "shapes-tiny", "--output", str(tmp_path / "run"),
        *settings("data.workers=2", "data.shapes_train=400", "data.shapes_val=4"),
    ]  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while len(loading := children.read_text().split()) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    os.kill(int(loading[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "SIGKILL, most likely because memory ran out" in line
    assert "--set data.workers=1" in line
    assert "Traceback" not in err


def test_an_image_that_changed_after_the_check_is_reported_and_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run("shapes", tmp_path / "set", "--count", "4", "--seed", "1")
    assert result.exit_code == 0
    source = read_data_set(tmp_path / "set", "train")
    from PIL import Image

    Image.new("RGB", (5, 7)).save(tmp_path / "set" / "images" / source.info(1).file_name)
    size = PreprocessConfig(short_side=32, max_side=64)
    data = TrainingSet(source, [0, 1, 2], size, config=DataConfig(flip_probability=0.0), seed=0)
    with load_batches(data, [[(0, 0)], [(0, 1)]], workers=1) as loaded:
        assert [batch.image_ids for batch in loaded] == [[source.info(i).id] for i in (0, 2)]
    assert "is 5x7 pixels, but its annotation says" in capfd.readouterr().err


# Memory grows with the objects, not with objects x image.


@FEW
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_a_run_length_mask_is_its_bitmap(seed: int, height: int, width: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    bitmap = rng.random((height, width)) < share
    bitmap &= rng.random((1, width)) < 0.8  # with columns of nothing
    edges = np.flatnonzero(np.diff(bitmap.ravel(order="F"), prepend=False))
    runs = np.diff(edges, prepend=0, append=height * width).tolist()
    mask = read_segmentation({"size": [height, width], "counts": runs}, height, width)
    np.testing.assert_array_equal(mask.bitmap(), bitmap)
    assert mask.area == bitmap.sum()
    x, y, crop = mask.crop()
    x1, y1, x2, y2 = mask.bounds
    assert crop.shape == (y2 - y1, x2 - x1)
    assert (x, y) == (x1, y1)
    assert crop.sum() == bitmap.sum()
    np.testing.assert_array_equal(crop, bitmap[y1:y2, x1:x2])
    if crop.size:
        assert crop[[0, -1]].any(axis=1).all()
        assert crop[:, [0, -1]].any(axis=0).all()
    ends = np.sort(rng.integers(0, [[width + 1], [height + 1]], (2, 2)), axis=1)
    (left, right), (top, bottom) = ends.tolist()
    np.testing.assert_array_equal(
        mask.part(left, top, right, bottom), bitmap[top:bottom, left:right]
    )
    again = read_segmentation(mask.to_coco(), height, width)
    np.testing.assert_array_equal(again.bitmap(), bitmap)


class Crowded(ShapesSource):
    """Many small objects in a large image."""

    COUNT, SIDE = 300, 1500

    def annotations(self, index: int) -> list[dict[str, object]]:
        rng = np.random.default_rng(index)
        corners = rng.integers(0, self.SIDE - 40, (self.COUNT, 2)).tolist()
        return [
            {
                "id": i, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 1200,
                "bbox": [x, y, 40, 30],
                "segmentation": [[x, y, x + 40, y, x + 40, y + 30, x, y + 30]],
            }
            for i, (x, y) in enumerate(corners)
        ]  # fmt: skip

    def info(self, index: int) -> object:
        from comask.data.source import ImageInfo

        return ImageInfo(id=1, file_name="a.png", height=self.SIDE, width=self.SIDE)

    def image(self, index: int) -> np.ndarray:
        return np.zeros((self.SIDE, self.SIDE, 3), np.uint8)


def test_masks_take_memory_by_their_own_area() -> None:
    source = Crowded(num_images=1, seed=0)
    size = PreprocessConfig(short_side=200, max_side=200)
    data = TrainingSet(source, [0], size, config=DataConfig(flip_probability=0.0), seed=0)  # type: ignore[arg-type]
    target = data[(0, 0)][2]
    assert len(target.labels) == Crowded.COUNT
    assert target.masks.pixels.dtype == torch.uint8
    assert (
        target.masks.pixels.numel() == Crowded.COUNT * 40 * 30
    )  # and 562 times as much as bitmaps
