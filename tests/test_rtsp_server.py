"""Live streams of a real RTSP server, GStreamer's, which tests kill, freeze and start again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from rtsp_server import PASSWORD, USER
from video_clips import decoded, make_clip, pictures, sound_packets

from comask.config import PreprocessConfig
from comask.runtime import Predictor
from comask.runtime.backends.base import Stages
from comask.runtime.video import OverlayWriter, VideoPipeline, VideoSource
from comask.runtime.video.container import shown_name

pytestmark = pytest.mark.slow

REPORT = Path(sys.prefix) / "rtsp"  # of install_debian.py
SYSTEM_PYTHON = "/usr/bin/python3"  # that has the server's bindings
SERVER = Path(__file__).with_name("rtsp_server.py")
STILL_READING = "a thread still reads while Python ends"
# While FFmpeg waits for data it calls into Python, and crashes the process where that has ended.
PROGRAM = f"""
import atexit, threading
from comask.cli.infer import main
def check():
    if any(thread.name == "decode" for thread in threading.enumerate()):
        print("{STILL_READING}")
atexit.register(check)
main()
"""
COMMAND = [sys.executable, "-c", PROGRAM]
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
RATE = 25  # frames a second, where a test asks for no other
SECONDS = 90  # that anything awaited may take


@pytest.fixture(scope="session", autouse=True)  # before any other, which may take long
def _installed() -> None:
    told = REPORT.read_text().strip() if REPORT.is_file() else ""
    if told != "ready":
        pytest.skip(told or "no RTSP server: tests/install_debian.py gets one")


@dataclass(frozen=True)
class Camera:
    """A server that runs."""

    process: subprocess.Popen[str]
    port: int

    @property
    def address(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/live"


@contextmanager
def camera(*options: object, port: int = 0) -> Iterator[Camera]:
    """A server that is ready; its end is that of the block, if it was not killed before."""
    command = [SYSTEM_PYTHON, SERVER, "--port", port, *options]
    with subprocess.Popen(
        [str(part) for part in command], env=os.environ | QUIET, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            assert said[:1] == ["serving"], said
            yield Camera(process, int(said[1]))
        finally:
            process.kill()  # also where it is frozen


@dataclass(frozen=True)
class Watching:
    """A command at work, whose words go to files."""

    process: subprocess.Popen[bytes]
    folder: Path

    def lines(self) -> list[dict[str, Any]]:
        """The results so far, without a line that is being written."""
        files = list(self.folder.glob("out/*_live.jsonl"))
        whole = files[0].read_text().rpartition("\n")[0] if files else ""
        return [json.loads(line) for line in whole.splitlines()]

    def until(self, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The results, as soon as there are enough of them."""
        deadline = time.monotonic() + SECONDS
        while not enough(lines := self.lines()):
            assert self.process.poll() is None, self.words()
            assert time.monotonic() < deadline, self.words()
            time.sleep(0.05)
        return lines

    def words(self) -> str:
        """All that was said, on both outputs."""
        return (self.folder / "words").read_text()

    def ended(self, number: signal.Signals | None = None, seconds: float = 15) -> str:
        """What it had said when it ended by itself or, soon, by a signal."""
        if number is not None:
            self.process.send_signal(number)
        self.process.wait(SECONDS if number is None else seconds)
        words = self.words()
        assert "Traceback" not in words, words
        assert STILL_READING not in words, words
        return words


@contextmanager
def watching(
    bundle: Path, address: str, folder: Path, *options: object, save: str = "coco"
) -> Iterator[Watching]:
    """`comask infer` on a stream, with its results in `folder`/out and its report beside them."""
    arguments = (bundle, address, *options, "--output", folder / "out", "--save", save,
                 "--backend", "onnxruntime", "--json", folder / "r.json")  # fmt: skip
    with (
        (folder / "words").open("wb") as words,
        subprocess.Popen(
            [*COMMAND, *(str(argument) for argument in arguments)],
            env=os.environ | QUIET, stdout=words, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        try:
            yield Watching(process, folder)
        finally:
            process.kill()


def assert_in_time(lines: list[dict[str, Any]]) -> None:
    """Times are as far apart as the camera took the frames, those that were dropped among them."""
    for before, after in pairwise(lines):
        assert after["frame"] > before["frame"]
        apart = (after["frame"] - before["frame"]) / RATE
        assert after["time"] - before["time"] == pytest.approx(apart, abs=2e-3), (before, after)


def parts(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Lines without a gap of more than two seconds between them."""
    found = [lines[:1]]
    for before, after in pairwise(lines):
        if after["time"] - before["time"] > 2:
            found.append([])
        found[-1].append(after)
    return found


@pytest.mark.parametrize("over", ["tcp", "udp"])
def test_a_camera_is_watched_until_it_is_interrupted(
    micro_bundle: Path, tmp_path: Path, over: str
) -> None:
    """Over UDP too, where the camera gives nothing over TCP."""
    with (
        camera(*(["--udp"] if over == "udp" else [])) as served,
        watching(micro_bundle, served.address, tmp_path) as command,
    ):
        command.until(lambda lines: len(lines) >= 60)
        words = command.ended(signal.SIGINT)
    assert command.process.returncode == 130, words
    text = (tmp_path / "out" / f"127.0.0.1_{served.port}_live.jsonl").read_text()
    assert text.endswith("}\n")
    lines = [json.loads(line) for line in text.splitlines()]
    assert f"{served.address}: interrupted after {len(lines)} frames in" in words
    assert "reconnects" not in words
    assert "damaged" not in words
    # from the camera's first frame on, which may have been dropped for a newer one
    assert lines[0]["time"] == pytest.approx(lines[0]["frame"] / RATE, abs=2e-3)
    assert {(line["width"], line["height"]) for line in lines} == {(96, 64)}
    assert any(line["detections"] for line in lines)
    assert_in_time(lines)
    report = json.loads((tmp_path / "r.json").read_text())
    (video,) = report["videos"]
    assert report["interrupted"]
    assert video["frames"] == len(lines)
    assert video["dropped"] >= lines[-1]["frame"] + 1 - len(lines)


def test_a_camera_that_went_down_is_found_again(micro_bundle: Path, tmp_path: Path) -> None:
    with (
        camera("--sound", "aac") as served,
        watching(
            micro_bundle, served.address, tmp_path, "--threshold", 0, save="overlay,coco"
        ) as command,
    ):
        command.until(lambda lines: len(lines) >= 30)
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
        killed = time.monotonic()
        time.sleep(2.5)
        before = len(command.lines())
        with camera("--sound", "aac", port=served.port):
            command.until(lambda lines: len(lines) >= before + 30)
            away = time.monotonic() - killed
            words = command.ended(signal.SIGINT)
    assert command.process.returncode == 130, words
    lines = command.lines()
    assert f"interrupted after {len(lines)} frames in" in words
    assert words.splitlines()[-1].endswith(", 1 reconnects")
    first, second = parts(lines)
    assert len(first) >= 30
    assert len(second) >= 30
    assert_in_time(first)
    assert_in_time(second)
    assert second[0]["frame"] == first[-1]["frame"] + 1
    assert 2.5 < second[0]["time"] - first[-1]["time"] < away
    (overlay,) = tmp_path.glob("out/*.overlay.mp4")
    assert [frame.time for frame in decoded(overlay)] == pytest.approx(
        [line["time"] for line in lines], abs=2e-3
    )
    sound = [float(moment) for moment, _ in sound_packets(overlay)]
    # one gap in the sound as well, at the same place
    (gap,) = [(a, b) for a, b in pairwise(sound) if b - a > 2]
    assert gap == pytest.approx((first[-1]["time"], second[0]["time"]), abs=0.5)


def test_a_camera_that_froze_is_found_again(micro_bundle: Path, tmp_path: Path) -> None:
    """It gives nothing and keeps the connection, until ten seconds have passed."""
    with (
        camera() as served,
        watching(micro_bundle, served.address, tmp_path) as command,
    ):
        command.until(lambda lines: len(lines) >= 30)
        served.process.send_signal(signal.SIGSTOP)
        time.sleep(14)
        before = len(command.lines())
        served.process.send_signal(signal.SIGCONT)
        command.until(lambda lines: len(lines) >= before + 30)
        words = command.ended(signal.SIGINT)
    assert command.process.returncode == 130, words
    assert "1 reconnects" in words
    first, second = parts(command.lines())
    assert_in_time(first)
    assert_in_time(second)
    assert 10 < second[0]["time"] - first[-1]["time"] < 20


def test_a_camera_that_comes_back_with_other_sound(micro_bundle: Path, tmp_path: Path) -> None:
    """The overlay's track is for the first sound; packets of another codec have no place in it."""
    with (
        camera("--sound", "aac") as served,
        watching(micro_bundle, served.address, tmp_path, save="overlay,coco") as command,
    ):
        command.until(lambda lines: len(lines) >= 20)
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
        time.sleep(2)
        before = len(command.lines())
        with camera("--sound", "opus", "--size", "128x64", port=served.port):
            command.until(lambda lines: len(lines) >= before + 30)
            words = command.ended(signal.SIGINT)
    assert command.process.returncode == 130, words
    assert "1 reconnects" in words
    first, second = parts(command.lines())
    assert {(line["width"], line["height"]) for line in first} == {(96, 64)}
    assert {(line["width"], line["height"]) for line in second} == {(128, 64)}
    (overlay,) = tmp_path.glob("out/*.overlay.mp4")
    frames = decoded(overlay)
    assert len(frames) == len(first) + len(second)
    assert {(frame.width, frame.height) for frame in frames} == {(96, 64)}
    with av.open(str(overlay)) as container:
        sound = list(container.decode(audio=0))  # raises where a packet is not AAC
    assert len(sound) > 10
    assert float(sound[-1].time) < second[0]["time"]


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_camera_does_not_keep_the_command(
    micro_bundle: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """An interruption ends it while it waits for a frame, and while it waits to connect again."""
    with (
        camera() as served,
        watching(micro_bundle, served.address, tmp_path, save="overlay,coco") as command,
    ):
        command.until(lambda lines: len(lines) >= 10)
        served.process.send_signal(how)
        time.sleep(4)
        words = command.ended(signal.SIGINT)
    assert command.process.returncode == 130, words
    lines = command.lines()
    assert f"interrupted after {len(lines)} frames in" in words
    assert "300 s" not in words  # it did not look for it that long
    (overlay,) = tmp_path.glob("out/*.overlay.mp4")
    assert len(decoded(overlay)) == len(lines)


def predictor_that_takes(seconds: float) -> Predictor:
    """It finds nothing."""

    class Slow(Stages):
        def run(self, images: np.ndarray, image_sizes: np.ndarray) -> dict[str, np.ndarray]:
            assert len(images) == 1
            time.sleep(seconds)
            shapes = {"num_detections": (1,), "boxes": (1, 0, 4), "scores": (1, 0),
                      "labels": (1, 0), "masks": (1, 0, 28, 28)}  # fmt: skip
            return {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}

    stages = Slow("slow", None, None)  # type: ignore[arg-type]
    return Predictor(stages, PreprocessConfig(short_side=64, max_side=96))


def test_frames_that_come_too_fast_are_counted() -> None:
    seen: list[tuple[int, int | None]] = []

    class Seen:
        def add(self, frame: Any, found: object, track_ids: object) -> None:
            seen.append((frame.index, frame.pts))

    with camera("--rate", 50, "--frames", 200) as served:
        source = VideoSource(served.address, patience=0)
        assert source.live
        report = VideoPipeline(predictor_that_takes(0.2), source, [Seen()]).run()
    # The camera's stamps say how many it sent: the server itself may lose one at the start.
    came, last_stamp = seen[-1][0] + 1, seen[-1][1]
    assert 195 <= came <= 200
    assert last_stamp == (came - 1) * 90_000 // 50
    assert report.frames + report.dropped == came
    assert report.frames == len(seen)
    assert 10 < report.frames < 60
    assert seen[-2][0] == came - 2  # the newest ones are looked at
    assert (report.damaged, report.reconnects) == (0, 0)


@pytest.mark.parametrize("method", ["basic", "digest"])
def test_passwords_are_used_and_not_shown(micro_bundle: Path, tmp_path: Path, method: str) -> None:
    with camera("--login", method) as served:
        place = served.address.removeprefix("rtsp://")
        right = f"rtsp://{USER}:s3cret%20p%40ss%2Fword@{place}?token=hidden"
        wrong = f"rtsp://{USER}:s3cret-wrong@{place}?token=hidden"
        (tmp_path / "right").mkdir()
        with watching(micro_bundle, right, tmp_path / "right", "-v") as command:
            command.until(lambda lines: len(lines) >= 10)
            served.process.send_signal(signal.SIGKILL)  # that it is lost is told without them too
            time.sleep(2)
            words = command.ended(signal.SIGINT)
        assert command.process.returncode == 130, words
        assert f"{served.address}: interrupted after" in words
    with camera("--login", method, port=served.port):
        (tmp_path / "wrong").mkdir()
        with watching(micro_bundle, wrong, tmp_path / "wrong", "-v") as command:
            refused = command.ended()
        assert command.process.returncode == 1, refused
        assert f"skipped: {served.address}: cannot be opened: Server returned 401" in refused
    for path in tmp_path.rglob("*"):
        shown = str(path) + (path.read_text() if path.is_file() else "")
        for secret in (PASSWORD, "s3cret", "hidden", f"{USER}:", f"{USER}@"):
            assert secret not in shown, path


@pytest.mark.parametrize("mark", ["#", "/", "?", "@"])
def test_passwords_that_are_not_escaped_are_not_shown(mark: str) -> None:
    """Such an address may lead nowhere, which is told without them."""
    shown = shown_name(f"rtsp://{USER}:first{mark}second@127.0.0.1:1/live")
    for secret in ("first", "second", USER):
        assert secret not in shown


def test_schemes_may_be_in_capitals() -> None:
    with camera() as served, VideoSource(served.address.replace("rtsp", "RTSP")) as source:
        assert source.name == served.address
        assert next(iter(source)).pixels.shape == (64, 96, 3)


@contextmanager
def silence() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.parametrize("why", ["nobody listens", "nobody answers", "it has no such stream"])
def test_a_camera_that_is_not_there_is_skipped(
    micro_bundle: Path, tmp_path: Path, why: str
) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(10))
    with silence() as port, camera() as served:
        address, reason = {
            "nobody listens": ("rtsp://127.0.0.1:1/live", "Connection refused"),
            "nobody answers": (f"rtsp://127.0.0.1:{port}/live", ""),
            "it has no such stream": (f"{served.address[:-4]}other", "Server returned 404"),
        }[why]
        with watching(micro_bundle, address, tmp_path, clip) as command:
            words = command.ended()
    assert command.process.returncode == 1, words
    assert f"skipped: {address}: cannot be opened: {reason}" in words
    assert words.count("skipped: ") == 1
    assert "Invalid data" not in words  # there was none
    assert f"{clip}: 10 frames in" in words
    assert len((tmp_path / "out" / "a.mp4.jsonl").read_text().splitlines()) == 10
    report = json.loads((tmp_path / "r.json").read_text())
    assert [failure["file"] for failure in report["failures"]] == [address]


def test_an_interruption_while_a_camera_is_opened_ends_the_command(
    micro_bundle: Path, tmp_path: Path
) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(10))
    with (
        silence() as port,
        watching(micro_bundle, f"rtsp://127.0.0.1:{port}/live", tmp_path, clip) as command,
    ):
        deadline = time.monotonic() + SECONDS
        while "backend onnxruntime" not in command.words():
            assert time.monotonic() < deadline, command.words()
            time.sleep(0.05)
        time.sleep(1)
        words = command.ended(signal.SIGINT)
    assert command.process.returncode == 130, words
    assert "a.mp4: " not in words  # what follows is not begun


def test_the_overlay_holds_the_sound(micro_bundle: Path, tmp_path: Path) -> None:
    with (
        camera("--sound", "aac") as served,
        watching(micro_bundle, served.address, tmp_path, save="overlay,coco") as command,
    ):
        command.until(lambda lines: len(lines) > 0 and lines[-1]["time"] > 5)
        words = command.ended(signal.SIGINT)
    assert command.process.returncode == 130, words
    assert "is without" not in words
    lines = command.lines()
    (overlay,) = tmp_path.glob("out/*.overlay.mp4")
    assert [frame.time for frame in decoded(overlay)] == pytest.approx(
        [line["time"] for line in lines], abs=2e-3
    )
    assert_in_time(lines)
    moments = [float(moment) for moment, _ in sound_packets(overlay)]
    assert moments[0] < 0.2
    assert moments[-1] == pytest.approx(lines[-1]["time"], abs=1)
    assert np.diff(moments) == pytest.approx(1024 / 48000, abs=2e-3)  # each of AAC's packets


def test_sound_of_the_telephones_codec(micro_bundle: Path, tmp_path: Path) -> None:
    """G.711, which many cameras send, is in the overlay, or it is said that it is not."""
    with (
        camera("--sound", "mulaw") as served,
        watching(micro_bundle, served.address, tmp_path, save="overlay,coco") as command,
    ):
        command.until(lambda lines: len(lines) >= 20)
        words = command.ended(signal.SIGINT)
    assert command.process.returncode == 130, words
    lines = command.lines()
    assert_in_time(lines)
    (overlay,) = tmp_path.glob("out/*.overlay.*")
    assert len(decoded(overlay)) == len(lines)
    without = re.search("the overlay is without 1 audio track .*pcm_mulaw", words)
    with av.open(str(overlay)) as container:
        assert len(container.streams.audio) == (0 if without else 1), words


def test_sound_that_is_not_written_is_not_kept(tmp_path: Path) -> None:
    """A camera is watched for days."""

    class Enough:
        count = 0

        def add(self, frame: object, found: object, track_ids: object) -> None:
            self.count += 1
            if self.count == 40:
                pipeline.stop()

    with camera("--sound", "mulaw") as served:
        source = VideoSource(served.address, audio=True)
        with OverlayWriter(tmp_path / "a", source) as overlay:
            pipeline = VideoPipeline(predictor_that_takes(0.05), source, [overlay, Enough()])
            pipeline.run()
            held = len(source.audio_packets)
    assert held < 50


def test_a_recording_is_read_whole(micro_bundle: Path, tmp_path: Path) -> None:
    """A stream that states its duration is no camera: no frame of it is dropped."""
    clip = make_clip(tmp_path / "a.mp4", pictures(50))
    with (
        camera("--clip", clip) as served,
        watching(micro_bundle, served.address, tmp_path) as command,
    ):
        words = command.ended()
    assert command.process.returncode == 0, words
    assert f"{served.address}: 50 frames in" in words
    lines = command.lines()
    assert [line["frame"] for line in lines] == list(range(50))
    assert lines[0]["time"] == 0
    assert_in_time(lines)


def test_a_recording_that_is_cut_short_is_incomplete(micro_bundle: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(100))
    with (
        camera("--clip", clip) as served,
        watching(micro_bundle, served.address, tmp_path) as command,
    ):
        command.until(lambda lines: len(lines) >= 10)
        served.process.send_signal(signal.SIGKILL)
        words = command.ended()
    assert command.process.returncode == 1, words
    lines = command.lines()
    assert 10 <= len(lines) < 100
    assert f"incomplete: {served.address}: its data ends at" in words
    assert f"{served.address}: {len(lines)} frames in" in words
