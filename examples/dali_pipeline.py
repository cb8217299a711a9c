"""Finds instances in a folder of JPEG and PNG files that NVIDIA DALI reads and decodes.

Run it as `python examples/dali_pipeline.py BUNDLE FOLDER`, after `pip install nvidia-dali-cuda130`. With
a TensorRT backend DALI decodes on the GPU and comask reads its images there; otherwise both use the CPU.

Images may be of any sizes: of those that DALI decodes together, the ones of one canvas run as a batch.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comask.runtime import Detections, Predictor
from nvidia.dali import fn, pipeline_def

from comask.preprocess import padded_shape, resized_shape

SUFFIXES = (".jpg", ".jpeg", ".png")


@pipeline_def
def decoded(files: list[str], device: str) -> Any:
    """u8 [h, w, 3] RGB each, upright as their EXIF data say."""
    encoded, _ = fn.readers.file(files=files)
    return fn.decoders.image(encoded, device=device)


def detections(predictor: Predictor, files: list[str]) -> Iterator[tuple[str, Detections]]:
    """Of each file, in an order of their own."""
    on_gpu = predictor.stages.backend.startswith("tensorrt")
    pipeline = decoded(
        files, "mixed" if on_gpu else "cpu", batch_size=predictor.max_batch, num_threads=4,
        device_id=0 if on_gpu else None,
    )  # fmt: skip
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
            best = max(found.scores, default=0)
            print(f"{file}: {len(found)} instances, best score {best:.4f}")


if __name__ == "__main__":
    main()
