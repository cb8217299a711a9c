"""Runs a bundle on a video that the GPU's decoder decodes; no pixel passes through the host.

Run `python examples/pynvvideocodec_pipeline.py BUNDLE VIDEO` after `pip install pynvvideocodec`. NVIDIA's
driver needs its video libraries; in a container, NVIDIA_DRIVER_CAPABILITIES must include video. With a
backend other than TensorRT, the frames are copied to the host. Frames are 8-bit NV12, as they were
decoded. PyNvVideoCodec does not report their colours, so set --matrix and --full-range.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Generator

from comask.errors import ComaskError
from comask.runtime import Detections, Future, Predictor
from comask.runtime.device import open_device

AHEAD = 8  # frames that the decoder's thread decodes in advance
SLOTS = 3  # frames that comask processes at once


def detections(
    predictor: Predictor, file: str, stream: int, **colours: object
) -> Generator[Detections]:
    """Yields the detections of each frame.

    Args:
        predictor: the predictor to run.
        file: the video.
        stream: the handle of the decoder's CUDA stream; 0 for frames on the host.
        colours: the arguments `matrix` and `full_range` of `submit`.
    """
    from PyNvVideoCodec import ThreadedDecoder  # imported here so that --help works without it

    decoder = ThreadedDecoder(file, AHEAD, cuda_stream=stream, use_device_memory=stream != 0)
    running: deque[Future] = deque()
    try:
        with predictor.stream(slots=SLOTS) as session:
            while decoded := decoder.get_batch_frames(1):
                # without stream=, the frame itself says when its pixels are complete
                future = session.submit(decoded[0], format="nv12", **colours)
                # The next call overwrites the frame: the decoder's stream waits until comask has read it.
                future.wait_read(stream)
                running.append(future)
                if len(running) == SLOTS:
                    yield running.popleft().result()
            yield from (future.result() for future in running)
    finally:
        decoder.end()


def main() -> None:
    """Prints one line per frame."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("video")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--matrix", default="bt709", choices=["bt601", "bt709", "bt2020"])
    parser.add_argument("--full-range", action="store_true")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        predictor = stack.enter_context(Predictor.load(asked.bundle, asked.backend))
        handle, colours = 0, {"matrix": asked.matrix, "full_range": asked.full_range}
        if predictor.stages.backend.startswith("tensorrt"):
            gpu = stack.enter_context(open_device())  # the decoder uses the primary context as well
            handle = stack.enter_context(contextlib.closing(gpu.stream())).handle
        all_frames = detections(predictor, asked.video, handle, **colours)
        stack.enter_context(contextlib.closing(all_frames))
        for number, instances in enumerate(itertools.islice(all_frames, asked.frames)):
            best = max(instances.scores, default=0)
            print(f"frame {number}: {len(instances)} instances, best score {best:.4f}")


if __name__ == "__main__":
    try:
        main()
    except (ComaskError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}: pip install pynvvideocodec")
