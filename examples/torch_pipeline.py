"""Runs a bundle on frames that PyTorch makes, on one CUDA stream.

Run `python examples/torch_pipeline.py BUNDLE`.

The loop stands for your own pipeline: PyTorch fills a tensor (here with moving stripes), comask detects
instances in it, and PyTorch uses their scores. On a GPU with a TensorRT backend, no pixel and no result
passes through the host. The CPU does not wait, because PyTorch's stream and comask's stream wait for each
other. Without a GPU, the same code runs on CPU tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import torch

from comask.errors import ComaskError
from comask.runtime import Predictor


def frame_at(time: int, device: str) -> torch.Tensor:
    """Returns a frame of moving stripes: u8 [3, 480, 640], planar RGB."""
    rows = torch.arange(480, device=device)[:, None]
    columns = torch.arange(640, device=device)[None]
    planes = [(rows * (i + 1) + columns * 2 + 8 * time) % 256 for i in range(3)]
    return torch.stack(planes).to(torch.uint8)


def main() -> None:
    """Prints one line per frame."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()
    with Predictor.load(arguments.bundle, arguments.backend) as predictor:
        on_gpu = predictor.stages.backend.startswith("tensorrt")
        device = "cuda" if on_gpu else "cpu"
        stream = torch.cuda.Stream() if on_gpu else None
        # In this block, PyTorch's work is queued on `stream`; `submit` queues comask's work.
        current = torch.cuda.stream(stream) if on_gpu else contextlib.nullcontext()
        with current, predictor.stream(stream) as session:
            futures = []
            best = torch.zeros(arguments.frames, device=device)
            for time in range(arguments.frames):
                future = session.submit(frame_at(time, device))
                # a view of comask's memory; torch's stream reads it after comask has written it
                scores = torch.from_dlpack(future.outputs["scores"])
                best[time] = scores[0].max()
                futures.append(future)
            for time, future in enumerate(futures):
                found = future.result()
                print(f"frame {time}: {len(found)} instances, best score {best[time]:.3f}")


if __name__ == "__main__":
    try:
        main()
    except (ComaskError, OSError) as error:
        sys.exit(f"error: {error}")
