"""Finds instances in a video that the GPU's decoder decodes; no pixel passes through the host.

Run it as `python examples/pynvvideocodec_pipeline.py BUNDLE VIDEO`, after `pip install pynvvideocodec`.
NVIDIA's driver must have its video part; in a container, set NVIDIA_DRIVER_CAPABILITIES to have video.
With a backend other than TensorRT the decoder's frames come to the host. Frames are NV12 as they were
decoded, of 8 bits. The package does not tell of their colours: see --matrix and --full-range.
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

AHEAD = 8  # frames that a thread of the decoder's decodes before they are asked for
SLOTS = 3  # frames that comask works on at once


def detections(
    predictor: Predictor, file: str, stream: int, **how: object
) -> Generator[Detections]:
    """Of each frame; `stream` is the handle of the decoder's CUDA stream, 0 for frames on the host."""
    from PyNvVideoCodec import ThreadedDecoder  # here, as --help needs none

    decoder = ThreadedDecoder(file, AHEAD, cuda_stream=stream, use_device_memory=stream != 0)
    running: deque[Future] = deque()
    try:
        with predictor.stream(slots=SLOTS) as session:
            while decoded := decoder.get_batch_frames(1):
                # without stream= the frame itself says when it is written
                future = session.submit(decoded[0], format="nv12", **how)
                # the next call writes over its memory: let the decoder's stream wait until it is read
                future.wait_read(stream)
                running.append(future)
                if len(running) == SLOTS:
                    yield running.popleft().result()
            yield from (future.result() for future in running)
    finally:
        decoder.end()


def main() -> None:
    """Prints a line for each frame."""
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
            gpu = stack.enter_context(open_device())  # in the primary context, as the decoder is
            handle = stack.enter_context(contextlib.closing(gpu.stream())).handle
        found = detections(predictor, asked.video, handle, **colours)
        found = itertools.islice(stack.enter_context(contextlib.closing(found)), asked.frames)
        for number, instances in enumerate(found):
            best = max(instances.scores, default=0)
            print(f"frame {number}: {len(instances)} instances, best score {best:.4f}")


if __name__ == "__main__":
    try:
        main()
    except (ComaskError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}: pip install pynvvideocodec")
