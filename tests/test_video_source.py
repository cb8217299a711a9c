"""Frames of files and live sources, upright, in time, with what is damaged left out."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video_clips import make_clip, pictures, uneven_times

from comask.config import PreprocessConfig
from comask.errors import BackendUnavailableError, VideoError
from comask.runtime import Predictor
from comask.runtime.backends.base import Stages
from comask.runtime.video import Tracker, VideoPipeline, VideoSource, is_address, is_video
from comask.runtime.video.container import file_name, shown_name
from comask.runtime.video.pipeline import Channel


def test_frames_are_the_decoders_in_time(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mkv", pictures(16), uneven_times(16))
    with VideoSource(clip) as source:
        frames = list(source)
    with av.open(str(clip)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.index for frame in frames] == list(range(16))
    assert [frame.time for frame in frames] == [Fraction(t, 1000) for t in uneven_times(16)]
    for frame, pixels in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame.pixels, pixels)
    with VideoSource(clip, every=3) as source:
        assert [frame.index for frame in source] == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_turns_frames_upright(tmp_path: Path, rotation: int) -> None:
    image = np.zeros((32, 64, 3), dtype=np.uint8)
    image[:16, :32] = 255  # the corner that is at the top left in the file
    clip = make_clip(tmp_path / "a.mp4", [image] * 3, rotation=rotation)
    with VideoSource(clip) as source:
        pixels = next(iter(source)).pixels
    assert pixels.shape == ((32, 64, 3) if rotation == 180 else (64, 32, 3))
    corners = {
        "top left": pixels[4, 4], "top right": pixels[4, -4],
        "bottom left": pixels[-4, 4], "bottom right": pixels[-4, -4],
    }  # fmt: skip
    # Counterclockwise, as a display matrix counts.
    white = {90: "bottom left", 180: "bottom right", -90: "top right"}[rotation]
    assert [name for name, color in corners.items() if color.min() > 200] == [white]


def test_videos_are_known_by_content(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(3))
    picture = Image.fromarray(pictures(1)[0])
    picture.save(tmp_path / "b.gif", save_all=True, append_images=[picture.rotate(90)])
    picture.save(tmp_path / "c.jpg")
    (tmp_path / "d.jpg").write_bytes((tmp_path / "c.jpg").read_bytes()[:300])
    (tmp_path / "e.txt").write_text("text")
    (tmp_path / "f.mp4").write_text("text")
    (tmp_path / "g").write_bytes(clip.read_bytes())
    (tmp_path / "h.png").write_bytes(clip.read_bytes())
    with av.open(str(tmp_path / "i.m4a"), "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=48000)
        output.mux(stream.encode(None))
    found = {p.name for p in tmp_path.iterdir() if is_video(p)}
    assert found == {"a.mp4", "f.mp4", "g", "h.png"}
    with pytest.raises(VideoError, match=r"f\.mp4: cannot be opened"):
        VideoSource(tmp_path / "f.mp4")


def test_addresses_and_their_names() -> None:
    for text in ("camera:0", "/dev/video2", "rtsp://a/b", "HTTP://a/b", "udp://@:5000"):
        assert is_address(text)
    for text in ("camera.mp4", "dir/camera:0", "file.http", "C:/a.mp4", "/dev/null"):
        assert not is_address(text)
    address = "rtsp://user:secret@cam.local:554/live/1?token=secret"
    assert shown_name(address) == "rtsp://cam.local:554/live/1"
    assert file_name(address) == "cam.local_554_live_1"
    assert file_name("camera:0") == "camera_0"
    assert file_name("folder/clip.mp4") == "clip.mp4"


def test_channel_blocks_drops_and_ends() -> None:
    blocking = Channel[int](2)
    sender = threading.Thread(
        target=lambda: [blocking.put(i) for i in range(5)] and blocking.close()
    )
    sender.start()
    assert [blocking.take(2), blocking.take(2), blocking.take(2), blocking.take()] == [
        [0, 1], [2, 3], [4], []
    ]  # fmt: skip
    sender.join()
    waiting = Channel[int](2)
    waiting.put(0)
    assert waiting.ready()
    assert not waiting.ready(2, 0.01)
    waiting.put(1)
    assert waiting.ready(3)  # more than it holds
    waiting.take(2)
    waiting.close()
    assert waiting.ready(2)
    dropping = Channel[int](2, drop_oldest=True)
    assert all(dropping.put(i) for i in range(5))
    dropping.close(ValueError("lost"))
    assert dropping.take(2) == [3, 4]
    assert dropping.dropped == 3
    with pytest.raises(ValueError, match="lost"):
        dropping.take()
    dropping.cancel()
    assert not dropping.put(1)


@contextmanager
def server(content: bytes, connections: int) -> Iterator[str]:
    """Serves `content` as a stream without an end, cutting every connection after it."""
    left = [connections]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            left[0] -= 1
            if left[0] < 0:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Type", "video/mp2t")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://me:secret@127.0.0.1:{http.server_port}/live"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_a_lost_stream_is_found_again_and_given_up(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.ts", pictures(10))
    with server(clip.read_bytes(), connections=2) as address:
        source = VideoSource(address, patience=3.5, audio=True)
        assert source.live
        started = time.monotonic()
        with source:
            frames = list(source)
    assert 3 < time.monotonic() - started < 15
    assert source.reconnects == 1
    assert [frame.index for frame in frames] == list(range(20))
    times = [frame.time for frame in frames]
    assert times[0] == 0
    assert all(a < b for a, b in pairwise(times))
    assert times[10] - times[9] > 0.4  # the wait of a second is in the times: 0.36 s lie before it
    assert "not found again" in str(source.problem)
    assert "secret" not in str(source.problem) + source.name
    assert len(source.audio_packets) > 10


def test_a_live_source_drops_the_oldest(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.ts", pictures(30))

    class Slow(Stages):
        def run(self, images: np.ndarray, image_sizes: np.ndarray) -> dict[str, np.ndarray]:
            assert len(images) == 1
            time.sleep(0.2)
            shapes = {"num_detections": (1,), "boxes": (1, 0, 4), "scores": (1, 0),
                      "labels": (1, 0), "masks": (1, 0, 28, 28)}  # fmt: skip
            return {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}

    stages = Slow("slow", None, None)  # type: ignore[arg-type]
    predictor = Predictor(stages, PreprocessConfig(short_side=64, max_side=96))
    seen: list[int] = []

    class Seen:
        def add(self, frame: object, found: object, track_ids: object) -> None:
            seen.append(frame.index)  # type: ignore[attr-defined]

    with server(clip.read_bytes(), connections=1) as address:
        source = VideoSource(address, patience=0)
        report = VideoPipeline(predictor, source, [Seen()]).run()
    assert report.frames + report.dropped == 30
    assert report.dropped > 20
    assert seen[-2:] == [28, 29]  # the newest ones


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("av", "trackers"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'comask\[video\]'"):
        VideoSource(tmp_path / "a.mp4")
    with pytest.raises(BackendUnavailableError, match=r"pip install 'comask\[track\]'"):
        Tracker()
    (tmp_path / "a.mp4").write_bytes(b"anything")
    assert is_video(tmp_path / "a.mp4")  # so that the command says what to install
    assert not is_video(tmp_path / "a.jpg")
