"""Small clips with sound, made by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from comask.data.shapes import ShapesSource

TIME_BASE = Fraction(1, 1000)
UNEVEN = (0, 40, 80, 90, 200, 240, 400, 401)  # milliseconds; a variable rate, repeated


def uneven_times(count: int) -> list[int]:
    return [440 * (i // len(UNEVEN)) + UNEVEN[i % len(UNEVEN)] for i in range(count)]


def pictures(count: int, height: int = 64, width: int = 96) -> list[NDArray[np.uint8]]:
    """Synthetic images of one size, a cut-out of each that moves with time."""
    source = ShapesSource(num_images=4, seed=4)
    found = []
    for i in range(count):
        image = source.image(i // 8 % 4)
        tiled = np.tile(
            image, (-(-2 * height // image.shape[0]), -(-2 * width // image.shape[1]), 1)
        )
        found.append(np.ascontiguousarray(tiled[i % height :, i % width :][:height, :width]))
    return found


def make_clip(
    path: Path,
    frames: Sequence[NDArray[np.uint8]],
    times: Sequence[int] | None = None,
    *,
    audio: str | None = "aac",
    codec: str = "libx264",
    rotation: int = 0,
    aspect: Fraction = Fraction(1),
) -> Path:
    """Writes frames at `times` in milliseconds (25 a second without), with a tone as long as they."""
    fixed = times is None and path.suffix in (".avi", ".mpg")  # whose rates are few or fixed
    times = times or [40 * i for i in range(len(frames))]
    with av.open(str(path), "w") as output:
        video = output.add_stream(codec, rate=25)
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = Fraction(1, 25) if fixed else TIME_BASE
        video.codec_context.sample_aspect_ratio = aspect
        if codec == "libx264":
            video.options = {"g": "10"}
        if rotation:
            video.set_display_rotation(rotation)
        sound = output.add_stream(audio, rate=48000) if audio else None
        if sound is not None:
            for packet in tone(sound, (times[-1] + 40) / 1000):
                output.mux(packet)
        for pixels, time in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            picture.pts, picture.time_base = time, TIME_BASE
            if fixed:
                picture.pts, picture.time_base = time // 40, Fraction(1, 25)
            output.mux(video.encode(picture))
        output.mux(video.encode(None))
    return path


def tone(stream: av.AudioStream, seconds: float) -> list[av.Packet]:
    packets, size = [], 1024
    for start in range(0, int(48000 * seconds), size):
        wave = np.sin(np.arange(start, start + size) * 2 * np.pi * 440 / 48000).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def decoded(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def sound_packets(path: Path) -> list[tuple[Fraction, bytes]]:
    """(seconds, content) of each audio packet."""
    with av.open(str(path)) as container:
        return [
            (packet.pts * packet.time_base, bytes(packet))
            for packet in container.demux(audio=0)
            if packet.size
        ]
