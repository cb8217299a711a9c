"""Runs a bundle on a folder of JPEG and PNG files that NVIDIA DALI reads and decodes.

Run `python examples/dali_pipeline.py BUNDLE FOLDER` after `pip install nvidia-dali-cuda130`. With a
TensorRT backend, DALI decodes on the GPU and comask reads the images there. Otherwise both use the CPU.
Images may have any size. Among the images that DALI decodes together, those with the same canvas run as
a batch.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comask.errors import ComaskError
from comask.preprocess import padded_shape, resized_shape
from comask.runtime import Detections, Predictor

SUFFIXES = (".jpg", ".jpeg", ".png")


def decoder(files: list[str], on_gpu: bool, batch: int) -> Any:
    """Returns a pipeline of u8 [h, w, 3] RGB images, rotated according to their EXIF data."""
    try:
        from nvidia.dali import fn, pipeline_def
    except ImportError as error:
        raise ComaskError(f"{error}: pip install nvidia-dali-cuda130") from error

    @pipeline_def
    def decoded() -> Any:
        encoded, _ = fn.readers.file(files=files)
        return fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu")

    return decoded(batch_size=batch, num_threads=4, device_id=0 if on_gpu else None)


def detections(predictor: Predictor, files: list[str]) -> Iterator[tuple[str, Detections]]:
    """Yields each file with its detections; the order of the files may change."""
    on_gpu = predictor.stages.backend.startswith("tensorrt")
    pipeline = decoder(files, on_gpu, predictor.max_batch)
    with predictor.stream() as session:
        for start in range(0, len(files), predictor.max_batch):
            (images,) = pipeline.run()  # DALI decoded these while comask ran the previous ones
            by_canvas = defaultdict(list)
            # after the last file the reader starts again; zip ignores these images
            for file, image in zip(files[start:], images, strict=False):
                size = resized_shape(tuple(image.shape()[:2]), predictor.preprocess)
                by_canvas[padded_shape(size, predictor.preprocess)].append((file, image))
            futures = [
                ([file for file, _ in group], session.submit([image for _, image in group]))
                for group in by_canvas.values()
            ]
            # With exec_dynamic=False, the next `run` of DALI would overwrite these images. comask
            # has read them by then, because `result` waits.
            for names, future in futures:
                yield from zip(names, future.result(), strict=True)


def main() -> None:
    """Prints one line per image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()
    files = sorted(str(f) for f in arguments.folder.iterdir() if f.suffix.lower() in SUFFIXES)
    with Predictor.load(arguments.bundle, arguments.backend) as predictor:
        for file, found in detections(predictor, files):
            print(f"{file}: {len(found)} instances, best score {max(found.scores, default=0):.4f}")


if __name__ == "__main__":
    try:
        main()
    except (ComaskError, OSError) as error:
        sys.exit(f"error: {error}")
