"""Videos as people have them: mirrored, cut off, joined, of any name, with unreadable tracks."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_clips import TIME_BASE, make_clip, pictures, tone

from comask.errors import VideoError
from comask.runtime.video import OverlayWriter, VideoSource, is_video
from comask.runtime.video.container import (
    file_url,
    open_container,
    orientation_from_matrix,
    video_errors,
)
from comask.structures import Detections

# (a, b, c, d) of the display matrices that turn by quarters or mirror: x goes to (a, b), y to (c, d).
EIGHT = [
    (sx, 0, 0, sy) for sx, sy in itertools.product((1, -1), repeat=2)
] + [(0, sx, sy, 0) for sx, sy in itertools.product((1, -1), repeat=2)]  # fmt: skip


def display_matrix(a: float, b: float, c: float, d: float) -> bytes:
    numbers = [round(65536 * value) for value in (a, b, c, d)]
    return struct.pack("=9i", *numbers[:2], 0, *numbers[2:], 0, 0, 0, 1 << 30)


def as_displayed(pixels: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """The picture that the matrix asks for, pixel by pixel."""
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    shown = np.empty((to_y.max() + 1, to_x.max() + 1, 3), pixels.dtype)
    shown[to_y, to_x] = pixels
    return shown


def clip_with_matrix(path: Path, frames: list[np.ndarray], *matrix: float) -> Path:
    """A clip whose track header has that matrix (`set_display_rotation` cannot mirror)."""
    content = make_clip(path, frames, audio=None).read_bytes()
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    place = content.index(identity, content.index(b"tkhd"))
    wanted = struct.pack(">9i", *struct.unpack("=9i", display_matrix(*matrix)))  # type: ignore[arg-type]
    path.write_bytes(content[:place] + wanted + content[place + 36 :])
    return path


@pytest.mark.parametrize("matrix", EIGHT)
def test_every_orientation_is_shown_as_players_show_it(
    tmp_path: Path, matrix: tuple[int, int, int, int]
) -> None:
    clip = clip_with_matrix(tmp_path / "a.mp4", pictures(3, 32, 48), *matrix)
    with av.open(str(clip)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    with VideoSource(clip) as source:
        frame = next(iter(source))
    np.testing.assert_array_equal(frame.pixels, as_displayed(stored, *matrix))


@given(st.sampled_from(EIGHT), st.floats(0.1, 100), st.floats(-0.9, 0.9))
def test_scale_and_a_degree_do_not_matter(
    matrix: tuple[int, int, int, int], scale: float, degrees: float
) -> None:
    a, b, c, d = (scale * value for value in matrix)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = (a * cos - b * sin, a * sin + b * cos, c * cos - d * sin, c * sin + d * cos)
    assert orientation_from_matrix(display_matrix(*turned)) == orientation_from_matrix(
        display_matrix(*matrix)
    )


def test_other_angles_are_refused(micro_bundle: Path, tmp_path: Path) -> None:
    half = 2**-0.5
    clip_with_matrix(tmp_path / "a.mp4", pictures(3), half, half, -half, half)
    make_clip(tmp_path / "b.mp4", pictures(3))
    result = run("infer", micro_bundle, tmp_path / "a.mp4", tmp_path / "b.mp4",
                 "--output", tmp_path / "out", "--save", "coco")  # fmt: skip
    assert result.exit_code == 1
    assert "a.mp4: its display matrix turns the picture by 45 degrees" in result.output
    assert "b.mp4: 3 frames in" in result.output


# What a file states, and what it has.


CONTAINERS = {
    "mp4": "aac", "mkv": "aac", "avi": "mp2", "flv": "aac", "webm": "libopus", "mov": "pcm_s16le",
}  # fmt: skip


def streamable(path: Path, count: int) -> Path:
    """A clip whose index, where it has one, lies before its data."""
    suffix = path.suffix[1:]
    codec = {"avi": "mpeg4", "webm": "libvpx-vp9"}.get(suffix, "libx264")
    whole = make_clip(path, pictures(count), audio=CONTAINERS[suffix], codec=codec)
    if suffix in ("mp4", "mov"):
        moved = whole.with_stem("moved")
        options = {"movflags": "faststart"}
        with (
            av.open(str(whole)) as source,
            av.open(str(moved), "w", container_options=options) as target,
        ):
            tracks = {s.index: target.add_stream_from_template(s) for s in source.streams}
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = tracks[packet.stream.index]
                    target.mux(packet)
        moved.replace(whole)
    return whole


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_a_video_that_ends_early_without_an_error_is_incomplete(
    tmp_path: Path, suffix: str
) -> None:
    whole = streamable(tmp_path / f"a.{suffix}", 50)
    with VideoSource(whole, audio=True) as source:
        assert len(list(source)) == 50
        assert source.problem is None
    content = whole.read_bytes()
    whole.write_bytes(content[: int(0.6 * len(content))])
    with VideoSource(whole, audio=True) as source:
        frames = len(list(source))
        assert 5 < frames < 50
        assert source.problem is not None
        words = "data ends at" if suffix == "flv" else f"it ends after {frames} of "
        assert words in source.problem


def test_what_an_edit_list_cuts_off_is_not_missing(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.mp4", pictures(30), audio=None)
    trimmed = tmp_path / "b.mp4"
    with av.open(str(whole)) as source, av.open(str(trimmed), "w") as target:
        track = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.dts is not None:
                shift = round(Fraction(3, 10) / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = track
                target.mux(packet)
    with VideoSource(trimmed) as source:
        times = [frame.time for frame in source]
    assert source.problem is None
    assert 20 <= len(times) < 30
    assert times[0] == 0


# Times.


def steps(path: Path) -> tuple[int, Fraction, set[float]]:
    """Number of frames, time of the first, and all differences between two that follow each other."""
    with VideoSource(path, audio=True) as source:
        times = [frame.time for frame in source]
    return len(times), times[0], {round(float(b - a), 3) for a, b in pairwise(times)}


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_an_avi_with_b_frames_has_its_frames_in_time(tmp_path: Path, codec: str) -> None:
    clip = tmp_path / "a.avi"
    with av.open(str(clip), "w") as output:
        video = output.add_stream(codec, rate=25, options={"bf": "2", "g": "12"})
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        for number, pixels in enumerate(pictures(30)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    with av.open(str(clip)) as container:  # the container's own are no use
        assert [p.pts for p in container.demux(video=0) if p.size] != list(range(30))
    assert steps(clip) == (30, 0, {0.04})


def test_a_raw_stream_has_no_times_and_gets_them_from_its_rate(tmp_path: Path) -> None:
    clip = tmp_path / "a.h264"
    with av.open(str(clip), "w", format="h264") as output:
        video = output.add_stream("libx264", rate=25, options={"bf": "2"})
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        for pixels in pictures(12):
            output.mux(
                video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p"))
            )  # fmt: skip
        output.mux(video.encode(None))
    assert steps(clip) == (12, 0, {0.04})


@pytest.mark.parametrize("suffix", ["ts", "mpg", "mkv", "avi"])
def test_files_joined_end_to_end_go_on_in_time(tmp_path: Path, suffix: str) -> None:
    codec = {"mpg": "mpeg2video", "avi": "mpeg4"}.get(suffix, "libx264")
    audio = "aac" if suffix in ("ts", "mkv") else "mp2"
    part = make_clip(tmp_path / f"a.{suffix}", pictures(40), audio=audio, codec=codec)
    alone, first, differences = steps(part)
    joined = tmp_path / f"b.{suffix}"
    joined.write_bytes(2 * part.read_bytes())
    assert (alone, *steps(joined)) == (40, 80, first, differences)
    assert suffix == "mpg" or differences == {0.04}  # which stamps not every frame


# Names.


NAMES = [
    "a:b.mp4", "-x.mp4", "x%d.mp4", "%03d.png", "[1].mp4", "a\nb.mp4", "rtsp:a.mp4", "http:a.mp4",
    "concat:a|b.mp4", "data:a,b.mp4", "subfile,,start,0,end,0,,:a.mp4", "file:a.mp4", "pipe:0",
    "camera:0", "a?b=c&d#e.mp4", " a .mp4", "ä.mp4", os.fsdecode(b"\xff\xfe.mp4"),
]  # fmt: skip


def test_a_local_file_is_a_file_whatever_its_name(micro_bundle: Path, tmp_path: Path) -> None:
    content = make_clip(tmp_path / "clip.mp4", pictures(4)).read_bytes()
    folder, output = tmp_path / "in:1%d[x]", tmp_path / "out:1%d[x]"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(content)
        assert is_video(folder / name), name
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the name alone is the path
        result = run("infer", micro_bundle, ".", "--output", output)
        assert result.exit_code == 0, result.output
        assert all(line.count("4 frames in") <= 1 for line in result.output.splitlines())
        for name in NAMES:
            lines = (output / f"{name}.jsonl").read_text().splitlines()
            assert [json.loads(line)["frame"] for line in lines] == list(range(4)), name
            with av.open(file_url(output / f"{name}.overlay.mp4")) as overlay:
                assert sum(1 for _ in overlay.decode(video=0)) == 4
        for pattern in ("-x.mp4", "[1].mp4", "x%d.mp4"):
            result = run(
                "infer", micro_bundle, pattern, "--output", tmp_path / "o", "--save", "coco"
            )
            assert result.exit_code == 0, result.output
    result = run(
        "infer", micro_bundle, folder / "x*.mp4", "--output", tmp_path / "o", "--save", "coco"
    )
    assert result.exit_code == 0, result.output  # a pattern in a folder with brackets


def test_a_result_that_cannot_have_its_name_is_that_videos_problem(
    micro_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (output / "a.mp4.overlay.mp4").mkdir(parents=True)
    (output / "b.mp4.jsonl").mkdir()
    for name in ("a", "b", "c"):
        make_clip(tmp_path / f"{name}.mp4", pictures(3))
    long = make_clip(tmp_path / f"{'n' * 246}.mp4", pictures(3))  # nothing can be appended
    clips = [tmp_path / f"{name}.mp4" for name in "abc"]
    result = run("infer", micro_bundle, *clips, long, "--output", output)
    assert result.exit_code == 1
    assert f"skipped: {tmp_path / 'a.mp4'}: {output / 'a.mp4.overlay.mp4'}: cannot" in result.output
    assert f"skipped: {tmp_path / 'b.mp4'}: {output / 'b.mp4.jsonl'}: cannot be" in result.output
    assert f"skipped: {long}: " in result.output
    assert "c.mp4: 3 frames in" in result.output


# Tracks.


def unreadable_sound(path: Path, frames: list[np.ndarray]) -> Path:
    """A clip whose sound says that it is of a kind for which FFmpeg has no decoder."""
    content = make_clip(path, frames).read_bytes()
    path.write_bytes(content.replace(b"mp4a", b"apac").replace(b"esds", b"dapa"))
    with av.open(str(path)) as container:
        assert container.streams.audio[0].codec_context is None
    return path


def test_tracks_that_an_overlay_cannot_take_are_dropped_with_a_line(
    micro_bundle: Path, tmp_path: Path
) -> None:
    unreadable_sound(tmp_path / "a.mov", pictures(4))
    with av.open(str(tmp_path / "b.mkv"), "w") as output:
        video = output.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        tracks = [output.add_stream("aac", rate=48000) for _ in range(2)]
        output.add_attachment("notes.txt", "text/plain", b"words")
        for track in tracks:
            output.mux(tone(track, 0.2))
        for number, pixels in enumerate(pictures(4)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = 40 * number, TIME_BASE
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    make_clip(tmp_path / "c.mp4", pictures(4))
    result = run("infer", micro_bundle, *(tmp_path / n for n in ("a.mov", "b.mkv", "c.mp4")),
                 "--output", tmp_path / "out", "--json", tmp_path / "r.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())["videos"]
    assert [video["left_out"] for video in found] == [
        ["1 audio track without a decoder"], ["1 audio track", "1 attachment track"], []
    ]  # fmt: skip
    assert "a.mov: 4 frames in" in result.output
    assert "the overlay is without 1 audio track without a decoder" in result.output
    for name, sounds in (("a.mov", 0), ("b.mkv", 1), ("c.mp4", 1)):
        with av.open(str(tmp_path / "out" / f"{name}.overlay.mp4")) as overlay:
            assert len(overlay.streams.audio) == sounds
            assert sum(1 for _ in overlay.decode(video=0)) == 4


def test_a_readable_sound_is_taken_before_an_unreadable_one(tmp_path: Path) -> None:
    clip = tmp_path / "a.mov"
    with av.open(str(clip), "w") as output:
        video = output.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        for track in [output.add_stream("aac", rate=48000) for _ in range(2)]:
            output.mux(tone(track, 0.2))
        frame = av.VideoFrame.from_ndarray(pictures(1)[0], format="rgb24")
        output.mux(video.encode(frame.reformat(format="yuv420p")))
        output.mux(video.encode(None))
    content = clip.read_bytes()
    place = content.index(b"mp4a")
    content = content[:place] + b"apac" + content[place + 4 :]
    place = content.index(b"esds")
    clip.write_bytes(content[:place] + b"dapa" + content[place + 4 :])
    with VideoSource(clip, audio=True) as source:
        assert source.audio_stream is not None
        assert source.audio_stream.index == 2
        assert source.left_out == ["1 audio track without a decoder"]


def test_sound_that_no_container_takes_is_left_out(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.avi", pictures(3), audio=None, codec="mpeg4")
    with av.open(str(tmp_path / "b.avi"), "w") as output, av.open(str(clip)) as container:
        video = output.add_stream_from_template(container.streams.video[0])
        sound = output.add_stream("adpcm_ms", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 4096), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 48000
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = video
                output.mux(packet)
    nothing = Detections(
        boxes_xyxy=np.zeros((0, 4), np.float32), scores=np.zeros(0, np.float32),
        labels=np.zeros(0, np.int64), mask_probs=np.zeros((0, 28, 28), np.float32),
        image_size=(64, 96),
    )  # fmt: skip
    source = VideoSource(tmp_path / "b.avi", audio=True)
    with OverlayWriter(tmp_path / "o", source) as writer:
        for frame in source:
            writer.add(frame, nothing, None)
    assert source.left_out == ["1 audio track in adpcm_ms"]
    with av.open(str(writer.path)) as overlay:
        assert not overlay.streams.audio
        assert sum(1 for _ in overlay.decode(video=0)) == 3


def atom(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, kind) + body


def with_cover(clip: Path) -> None:
    """Adds a cover picture to an MP4 file whose index lies behind its data, as iTunes does."""
    picture = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(picture, "JPEG")
    cover = atom(b"covr", atom(b"data", struct.pack(">II", 13, 0) + picture.getvalue()))
    handler = atom(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = atom(b"udta", atom(b"meta", bytes(4) + handler + atom(b"ilst", cover)))
    content = clip.read_bytes()
    place = content.rindex(b"moov") - 4
    index = content[place + 8 :]
    index = index[: index.index(b"udta") - 4] if b"udta" in index else index
    clip.write_bytes(content[:place] + atom(b"moov", index + tags))


def test_a_cover_is_left_out_and_never_the_video(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(3))
    with_cover(clip)
    with VideoSource(clip, audio=True) as source:
        assert [frame.size for frame in source] == [(64, 96)] * 3
        assert source.left_out == ["1 cover picture"]
    song = tmp_path / "song.mp4"
    with av.open(str(song), "w") as output:
        output.mux(tone(output.add_stream("aac", rate=48000), 0.2))
    with_cover(song)
    with av.open(str(song)) as container:
        assert container.streams.video  # FFmpeg shows the picture as a track
    with pytest.raises(VideoError, match="holds no video that can be decoded"):
        VideoSource(song)


# Errors.


def av_errors() -> Iterator[type[Exception]]:
    """Each kind of error of PyAV: some derive from OSError, some from EOFError, some from neither."""
    kinds = [av.FFmpegError]
    while kinds:
        kind = kinds.pop()
        yield kind
        kinds += kind.__subclasses__()


@pytest.mark.parametrize("kind", [*av_errors(), AttributeError, UnicodeDecodeError])
def test_every_error_of_the_library_names_its_source(kind: type[Exception], tmp_path: Path) -> None:
    if kind is UnicodeDecodeError:
        error: Exception = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")
    elif issubclass(kind, av.FFmpegError):
        error = kind(1, "broken", "a.mp4")
    else:
        error = kind("broken")
    with pytest.raises(VideoError, match=r"^clip: cannot be read: "), video_errors("clip"):
        raise error
    (tmp_path / "a.mp4").write_bytes(b"anything")
    with mock.patch("av.open", side_effect=error):
        assert is_video(tmp_path / "a.mp4")
        with pytest.raises(VideoError, match=r"a\.mp4: cannot be opened: "):
            open_container(str(tmp_path / "a.mp4"))


@pytest.mark.parametrize("suffix", ["ts", "webm", "mkv", "mp4", "avi", "flv", "mpg"])
def test_a_clip_cut_anywhere_never_ends_the_batch(
    micro_bundle: Path, tmp_path: Path, suffix: str
) -> None:
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpg": "mpeg2video"}.get(suffix, "libx264")
    audio = {"webm": "libopus", "avi": "mp2", "mpg": "mp2"}.get(suffix, "aac")
    content = make_clip(
        tmp_path / f"a.{suffix}", pictures(8), audio=audio, codec=codec
    ).read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    for number, share in enumerate((0.001, 0.01, 0.05, 0.2, 0.5, 0.8)):
        (folder / f"{number}.{suffix}").write_bytes(content[: int(share * len(content))])
    make_clip(folder / "z.mp4", pictures(2))
    result = run("infer", micro_bundle, folder, "--output", tmp_path / "out", "--save", "coco")
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "z.mp4: 2 frames in" in result.output
    told = [line for line in result.output.splitlines() if line.startswith(("skipped: ", "incom"))]
    assert len(told) >= 3
    assert all(str(folder) in line for line in told)
