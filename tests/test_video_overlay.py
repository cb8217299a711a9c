"""The overlay: nothing distorted, colours kept, one colour a track."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from video_clips import decoded, make_clip, pictures

from comask.draw import class_color, draw_overlay
from comask.runtime.video import OverlayWriter, SourceFrame, VideoSource
from comask.structures import Detections


def found(image: NDArray[np.uint8], *boxes: list[float]) -> Detections:
    count = len(boxes)
    return Detections(
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(count, 4),
        scores=np.linspace(0.9, 0.8, count, dtype=np.float32),
        labels=np.zeros(count, dtype=np.int64),
        mask_probs=np.ones((count, 28, 28), dtype=np.float32),
        image_size=(image.shape[0], image.shape[1]),
    )


@pytest.mark.parametrize("size", [(63, 97), (64, 97), (63, 96), (64, 96)])
def test_odd_sizes_are_padded_not_scaled(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    clip = make_clip(tmp_path / "a.mkv", [smooth(height, width)] * 4, codec="ffv1")
    source = VideoSource(clip)
    with OverlayWriter(tmp_path / "o", source) as writer:
        for frame in source:
            assert frame.pixels.shape == (height, width, 3)
            writer.add(frame, found(frame.pixels), None)
    source.close()
    drawn = decoded(writer.path)
    assert len(drawn) == 4
    assert (drawn[0].height, drawn[0].width) == (height + height % 2, width + width % 2)
    pixels = drawn[0].to_ndarray(format="rgb24")[:height, :width].astype(int)
    # Were they scaled, the far edges would fit a picture that is shifted by one.
    for axis, far in ((0, np.s_[-12:]), (1, np.s_[:, -12:])):
        shifted = np.roll(frame.pixels, 1, axis)
        assert distance(pixels[far], frame.pixels[far]) < 0.6 * distance(pixels[far], shifted[far])


def distance(a: NDArray[np.int64], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a - b).mean())


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """Gray slopes of 4 levels a pixel along both axes, that rise and fall."""
    y, x = np.mgrid[:height, :width] * 8
    gray = np.abs(x % 240 - 120) + np.abs(y % 240 - 120)
    return np.repeat(gray[..., None], 3, axis=2).astype(np.uint8)


def test_a_frame_of_another_size_is_fitted(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(2))
    source = VideoSource(clip)
    with OverlayWriter(tmp_path / "o", source) as writer:
        for index, shape in enumerate([(64, 96), (64, 64), (128, 96)]):
            gray = np.full((*shape, 3), 200, dtype=np.uint8)
            writer.add(SourceFrame(index, index, Fraction(index), gray), found(gray), None)
    source.close()
    shown = [frame.to_ndarray(format="rgb24").mean(axis=2) > 100 for frame in decoded(writer.path)]
    assert [picture.mean() for picture in shown] == pytest.approx([1, 64 / 96, 48 / 96], abs=0.03)


def test_wide_pixels_stay_wide_when_turned(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", pictures(2), rotation=90, aspect=Fraction(4, 3))
    source = VideoSource(clip)
    with OverlayWriter(tmp_path / "o", source) as writer:
        for frame in source:
            writer.add(frame, found(frame.pixels), None)
    source.close()
    with av.open(str(writer.path)) as container:
        video = container.streams.video[0]
        assert (video.width, video.height) == (64, 96)
        assert video.sample_aspect_ratio == Fraction(3, 4)


def test_without_frames_there_is_no_file(tmp_path: Path) -> None:
    with VideoSource(make_clip(tmp_path / "a.mp4", pictures(2))) as source:
        with OverlayWriter(tmp_path / "o", source) as writer:
            pass
        assert not writer.path.exists()


def test_a_track_has_its_colour_whatever_its_class() -> None:
    image = np.zeros((100, 200, 3), dtype=np.uint8)
    boxes = found(image, [20, 40, 60, 80], [120, 40, 160, 80])
    by_class = draw_overlay(image, boxes)
    by_track = draw_overlay(image, boxes, np.array([3, -1]))
    assert (by_class[60, 40] == by_class[60, 140]).all()
    ratio = by_track[60, 40] / np.array(class_color(3)).clip(1)
    assert ratio == pytest.approx([0.25] * 3, abs=0.05)
    assert len(set(by_track[60, 140].tolist())) == 1  # gray
    assert by_track[60, 140].min() > 0
