"""Counts the instances in each second of a video or camera stream, and writes an overlay on request.

python examples/pyav_pipeline.py demo/bundle clip.mp4 [overlay]   # overlay.mp4, with the sound
python examples/pyav_pipeline.py demo/bundle rtsp://camera/live   # until Ctrl-C
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections import Counter
from pathlib import Path

from comask.errors import ComaskError
from comask.runtime import Detections, Predictor
from comask.runtime.video import OverlayWriter, Sink, SourceFrame, VideoPipeline, VideoSource


class CountPerSecond:
    """A sink that prints, for each second, the largest number of instances of each class in a frame."""

    def __init__(self, threshold: float = 0.5) -> None:
        self._threshold = threshold
        self._second = 0
        self._most: Counter[str] = Counter()

    def add(self, frame: SourceFrame, found: Detections, track_ids: object) -> None:
        """Adds the results of one frame; the writing thread calls this in the order of the frames."""
        if int(frame.time) > self._second:
            self.print()
            self._second, self._most = int(frame.time), Counter()
        labels = found.labels[found.scores >= self._threshold]
        self._most |= Counter(found.name(label) for label in labels.tolist())

    def print(self) -> None:
        """Prints the counts of the current second."""
        seen = ", ".join(f"{count} {name}" for name, count in sorted(self._most.items()))
        print(f"{self._second:5} s: {seen or 'nothing'}", flush=True)


def main() -> None:
    """Runs the bundle on the video."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("address", help="a video, camera:0 or a stream's URL")
    parser.add_argument(
        "overlay", nargs="?", type=Path, help="overlay video to write, without .mp4"
    )
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        predictor = stack.enter_context(Predictor.load(asked.bundle))
        # decodes on the GPU if the predictor reads frames there
        audio = asked.overlay is not None
        source = VideoSource(asked.address, audio=audio, gpu=predictor.stages.gpu)
        counts = CountPerSecond()
        sinks: list[Sink] = [counts]
        if asked.overlay:
            sinks.append(stack.enter_context(OverlayWriter(asked.overlay, source)))
        pipeline = VideoPipeline(predictor, source, sinks, batch=4)
        signal.signal(signal.SIGINT, lambda *_: pipeline.stop())
        report = pipeline.run()
        counts.print()
    print(f"{report.frames} frames in {report.seconds:.1f} s, {report.dropped} dropped")
    if report.problem:
        sys.exit(f"{source.name}: {report.problem}")


if __name__ == "__main__":
    try:
        main()
    except (ComaskError, OSError) as error:
        sys.exit(f"error: {error}")
