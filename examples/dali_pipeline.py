"""Finds instances in a folder of JPEG and PNG files that NVIDIA DALI reads and decodes.

Run it as `python examples/dali_pipeline.py BUNDLE FOLDER`, after `pip install nvidia-dali-cuda130`. With
a TensorRT backend DALI decodes on the GPU and comask reads its images there; otherwise both use the CPU.
Images may be of any sizes: of those that DALI decodes together, the ones of one canvas run as a batch.
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
    """A pipeline that gives u8 [h, w, 3] RGB each, upright as their EXIF data say."""
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
    """Of each file, in an order of their own."""
    on_gpu = predictor.stages.backend.startswith("tensorrt")
    pipeline = decoder(files, on_gpu, predictor.max_batch)
    with predictor.stream() as session:
        for start in range(0, len(files), predictor.max_batch):
            (images,) = pipeline.run()  # decoded by now, while comask had the ones before
            by_canvas = defaultdict(list)
            # the reader begins again behind the last file, which zip ignores
            for file, image in zip(files[start:], images, strict=False):
                size = resized_shape(tuple(image.shape()[:2]), predictor.preprocess)
                by_canvas[padded_shape(size, predictor.preprocess)].append((file, image))
            futures = [
                ([file for file, _ in group], session.submit([image for _, image in group]))
                for group in by_canvas.values()
            ]
            # With exec_dynamic=False, DALI would overwrite its images in the next `run`, whoever holds
            # them; here they are read by then.
            for names, future in futures:
                yield from zip(names, future.result(), strict=True)


def main() -> None:
    """Prints a line for each image."""
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
