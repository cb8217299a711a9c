"""Videos for the stand-in decoder, and frames as PyAV gives them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
from video_clips import decoded


def write_pictures(clip: Path) -> Path:
    """Writes what standin_nvcuvid.c decodes: a clip's frames as NV12, in the order of its packets."""
    nv12 = {frame.pts: frame.reformat(format="nv12").to_ndarray() for frame in decoded(clip)}
    with av.open(str(clip)) as container:
        order = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert sorted(order) == sorted(nv12)
    assert order != sorted(nv12)  # there are B-frames
    pictures = clip.with_suffix(".nv12")
    pictures.write_bytes(b"".join(nv12[pts].tobytes() for pts in order))
    return pictures


def decoded_like(**changes: Any) -> Any:
    """What can be asked of a decoded frame, of one that the network can read but for `changes`."""
    names = {key: SimpleNamespace(name=changes.pop(key, default))
             for key, default in (("format", "cuda"), ("sw_format", "nv12"))}  # fmt: skip
    return SimpleNamespace(**names, **{"colorspace": 1, "color_range": 1} | changes)


def noise(colorspace: int, color_range: int) -> av.VideoFrame:
    """64 x 64 pixels of YUV that state a matrix and a range."""
    frame, rng = av.VideoFrame(64, 64, "yuv420p"), np.random.default_rng(0)
    for plane in frame.planes:
        plane.update(rng.integers(16, 236, plane.buffer_size, dtype=np.uint8).tobytes())
    frame.colorspace, frame.color_range = colorspace, color_range
    frame.time_base = Fraction(1, 25)
    return frame
