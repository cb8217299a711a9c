"""Video: runs a `Predictor` on files, cameras and streams, and writes overlays and JSON lines.

It needs PyAV (`pip install 'comask[video]'`), which is imported when a source is opened.
"""

from comask.runtime.video.container import is_address, is_video
from comask.runtime.video.hardware import Where
from comask.runtime.video.pipeline import Sink, VideoPipeline, VideoReport
from comask.runtime.video.sinks import JsonLines, OverlayWriter
from comask.runtime.video.source import SourceFrame, VideoSource
from comask.runtime.video.track import Tracker

__all__ = [
    "JsonLines",
    "OverlayWriter",
    "Sink",
    "SourceFrame",
    "Tracker",
    "VideoPipeline",
    "VideoReport",
    "VideoSource",
    "Where",
    "is_address",
    "is_video",
]
