"""`comask infer` over videos: the results of their frames as images, whole files whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run
from PIL import Image
from video_clips import decoded, make_clip, pictures, sound_packets, uneven_times


def lines_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def assert_equal_to_images(bundle: Path, clip: Path, folder: Path, every: int) -> None:
    """Runs a clip and its frames, and compares detections (exactly), times and sound."""
    result = run("infer", bundle, clip, "--output", folder / "v", "--every", every)
    assert result.exit_code == 0, result.output
    lines = lines_of(folder / "v" / f"{clip.name}.jsonl")
    frames = decoded(clip)[::every]
    (folder / "images").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame.to_ndarray(format="rgb24")).save(folder / "images" / f"{i:05}.png")
    result = run("infer", bundle, folder / "images", "--output", folder / "i", "--save", "coco")
    assert result.exit_code == 0, result.output
    by_image: dict[int, list[dict[str, Any]]] = {}
    for entry in json.loads((folder / "i" / "detections.json").read_text()):
        by_image.setdefault(entry.pop("image_id"), []).append(entry)
    assert by_image
    assert len(lines) == len(frames)
    for i, (line, frame) in enumerate(zip(lines, frames, strict=True)):
        assert line["frame"] == i * every
        assert line["pts"] == frame.pts
        assert line["time"] == pytest.approx(float(frame.time), abs=1e-9)
        assert [line["height"], line["width"]] == [frame.height, frame.width]
        assert all(entry.pop("image_id") == i * every for entry in line["detections"])
        assert line["detections"] == by_image.get(i + 1, [])
    (overlay,) = (folder / "v").glob(f"{clip.name}.overlay.*")
    assert [f.time for f in decoded(overlay)] == pytest.approx([f.time for f in frames], abs=5e-4)


def test_a_clip_gives_the_results_of_its_frames_and_keeps_its_sound(
    micro_bundle: Path, tmp_path: Path
) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(20), uneven_times(20))
    assert_equal_to_images(micro_bundle, clip, tmp_path, every=1)
    assert sound_packets(tmp_path / "v" / "a.mp4.overlay.mp4") == sound_packets(clip)


@pytest.mark.parametrize(
    ("name", "sound"),
    [("car-detection.mp4", True), ("one-by-one-person-detection_first60s.mp4", False)],
)
def test_real_clips(
    shared_data: Path, micro_bundle: Path, tmp_path: Path, name: str, sound: bool
) -> None:
    clip = shared_data / "video" / name
    assert_equal_to_images(micro_bundle, clip, tmp_path, every=25)
    if sound:
        found = sound_packets(tmp_path / "v" / f"{name}.overlay.mp4")
        assert len(found) > 1000
        # the overlay ends with the last 25th frame's packets at the latest
        assert found == sound_packets(clip)[: len(found)]
        assert len(sound_packets(clip)) - len(found) <= 3


@pytest.mark.parametrize(("suffix", "audio", "written"), [
    ("mkv", "mp2", "mkv"),  # which few players take in MP4
    ("ts", "aac", "mp4"),  # ADTS there, raw in MP4; times that start at 1.4 s
])  # fmt: skip
def test_other_containers_keep_sound_in_step(
    micro_bundle: Path, tmp_path: Path, suffix: str, audio: str, written: str
) -> None:
    clip = make_clip(tmp_path / f"a.{suffix}", pictures(12), uneven_times(12), audio=audio)
    result = run("infer", micro_bundle, clip, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    overlay = tmp_path / "out" / f"{clip.name}.overlay.{written}"
    ours, theirs = sound_packets(overlay), sound_packets(clip)
    assert len(ours) == len(theirs) > 5
    video, source = decoded(overlay), decoded(clip)
    assert len(video) == len(source) == 12
    # sound and picture lie as far apart as in the source, to a millisecond (Matroska's unit)
    offset = float(source[0].time - video[0].time)
    assert [float(t) + offset for t, _ in ours] == pytest.approx(
        [float(t) for t, _ in theirs], abs=2e-3
    )
    assert [f.time + offset for f in video] == pytest.approx([f.time for f in source], abs=2e-3)


def test_broken_videos_are_reported_and_the_batch_goes_on(
    micro_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    frames = pictures(100)
    clip = make_clip(folder / "a.mkv", frames)
    content = clip.read_bytes()
    (folder / "b.mp4").write_text("no video")
    (folder / "c.mkv").write_bytes(content[: len(content) // 2])
    damaged = bytearray(content)
    for place in range(len(content) // 3, 2 * len(content) // 3, 97):
        damaged[place] ^= 255
    (folder / "d.mkv").write_bytes(damaged)
    shutil.copy(clip, folder / "e.mkv")
    result = run("infer", micro_bundle, folder, "--output", tmp_path / "out", "--save", "coco",
                 "--json", tmp_path / "r.json")  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "b.mp4: cannot be opened" in result.output
    assert "c.mkv: it ends after " in result.output
    assert "d.mkv: " in result.output
    report = json.loads((tmp_path / "r.json").read_text())
    count = {Path(video["file"]).name: video["frames"] for video in report["videos"]}
    assert count["a.mkv"] == count["e.mkv"] == 100
    assert 20 < count["c.mkv"] < 80
    assert 20 < count["d.mkv"] < 100
    assert {Path(f["file"]).name for f in report["failures"]} == {"b.mp4", "c.mkv", "d.mkv"}
    good, part = (lines_of(tmp_path / "out" / f"{n}.mkv.jsonl") for n in "ac")
    assert part[:16] == good[:16]  # whole batches; another batch has other rounding


def test_options_that_do_not_fit_are_refused(micro_bundle: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(2))
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    for arguments, words in [
        ((clip, "--save", "masks"), "is for images"),
        ((tmp_path / "a.png", "--every", "2"), "no input is one"),
        ((tmp_path / "a.png", "--track"), "no input is one"),
        (("rtsp://me:secret@127.0.0.1:1/x",), "rtsp://127.0.0.1:1/x: cannot be opened"),
        (("camera:99",), "camera:99: cannot be opened: No such file"),
    ]:
        result = run("infer", micro_bundle, *arguments, "--output", tmp_path / "out")
        assert result.exit_code == 1
        assert words in result.output, result.output
        assert "secret" not in result.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_whole_files(
    micro_bundle: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(2000))
    command = [sys.executable, "-c", "from comask.cli.infer import main; main()",
               str(micro_bundle), str(clip), str(clip), "--output", str(tmp_path / "out")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    results = tmp_path / "out" / "a.mp4.jsonl"
    started = time.monotonic()
    while not (results.exists() and results.read_text().count("\n") >= 20):
        assert process.poll() is None
        assert time.monotonic() - started < 60
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    lines = lines_of(results)
    assert f"a.mp4: interrupted after {len(lines)} frames in" in out
    assert 20 <= len(lines) < 2000
    overlay = tmp_path / "out" / "a.mp4.overlay.mp4"
    assert len(decoded(overlay)) == len(lines)
    assert [line["frame"] for line in lines] == list(range(len(lines)))
    last = sound_packets(overlay)[-1][0]
    assert float(last) == pytest.approx(lines[-1]["time"], abs=2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_full_disk_is_one_line_and_leaves_no_part(
    micro_bundle: Path, tmp_path: Path, suffix: str
) -> None:
    clip = make_clip(
        tmp_path / f"a.{suffix}", pictures(30), audio="aac" if suffix == "mp4" else "mp2"
    )
    overlay = tmp_path / "out" / f"a.{suffix}.overlay.{suffix}"
    overlay.parent.mkdir()
    overlay.with_name(f".{overlay.name}.tmp").symlink_to("/dev/full")  # where it is written
    done = subprocess.run(
        [sys.executable, "-c", "from comask.cli.infer import main; main()", str(micro_bundle),
         str(clip), str(clip), "--output", str(overlay.parent), "--save", "overlay"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"error: {overlay}: cannot be written: No space left on device"
    )
    assert "Traceback" not in done.stderr
    assert list(overlay.parent.iterdir()) == []


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from comask.cli.infer import main
main()
"""


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])  # the header, a picture, the index at the end
def test_an_overlay_that_cannot_grow_is_that_videos_problem(
    micro_bundle: Path, tmp_path: Path, share: float
) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(30))
    small = make_clip(tmp_path / "b.mp4", pictures(2), audio=None)
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert run("infer", micro_bundle, clip, "--output", whole, "--save", "overlay").exit_code == 0
    size = (whole / "a.mp4.overlay.mp4").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(max(16, int(share * size))), str(micro_bundle),
         str(clip), str(small), "--output", str(output), "--save", "overlay"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"{output / 'a.mp4.overlay.mp4'}: cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    written = ["b.mp4.overlay.mp4"] if share else []
    assert [path.name for path in output.iterdir()] == written


MEMORY = """
import sys
from pathlib import Path
from comask.runtime import Predictor
from comask.runtime.video import JsonLines, OverlayWriter, VideoPipeline, VideoSource
bundle, clip, folder = sys.argv[1:]
with Predictor.load(bundle, "onnxruntime", max_batch=4) as predictor:
    for loop in range(10):
        source = VideoSource(clip, audio=True)
        with OverlayWriter(Path(folder, "o"), source) as overlay, JsonLines(Path(folder, "r")) as lines:
            assert VideoPipeline(predictor, source, [overlay, lines], batch=4).run().frames == 20
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(pages * 4096 / 2**20)
"""


def test_memory_stays_flat(micro_bundle: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(20, 480, 640))
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(micro_bundle), str(clip), str(tmp_path)],
        # What is freed goes back to the system: else glibc keeps frames, now some and now others.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    mebibytes = [float(line) for line in out.stdout.split()]
    assert len(mebibytes) == 10
    # One frame in four that was not freed would be 4.5 MiB a loop, and 22 between these.
    early, late = np.median(mebibytes[2:5]), np.median(mebibytes[7:])
    assert late - early < 11, mebibytes


def test_tracks_have_ids_and_colours(micro_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackers", reason="pip install 'comask[track]'")
    clip = make_clip(tmp_path / "a.mp4", [pictures(1)[0]] * 6)  # it stands still
    result = run("infer", micro_bundle, clip, "--output", tmp_path / "out", "--track",
                 "--threshold", "0.05", "--batch", "1")  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = lines_of(tmp_path / "out" / "a.mp4.jsonl")
    assert all("track_id" in found for line in lines for found in line["detections"])
    ids = [{found["track_id"] for found in line["detections"]} - {None} for line in lines]
    assert ids[0] == set()
    assert ids[2]
    assert np.mean([len(ids[2] & later) / len(ids[2]) for later in ids[3:]]) > 0.8


def test_the_example_counts_and_draws(micro_bundle: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(60))
    example = Path(__file__).parents[1] / "examples" / "pyav_pipeline.py"
    out = subprocess.run(
        [sys.executable, str(example), str(micro_bundle), str(clip), str(tmp_path / "o")],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert [line[:8] for line in out[:-1]] == ["    0 s:", "    1 s:", "    2 s:"]
    assert out[-1].startswith("60 frames in")
    assert out[-1].endswith(", 0 dropped")
    assert len(decoded(tmp_path / "o.mp4")) == 60
