"""Stands in for the part of NVIDIA DALI that the example uses, on the host, with Pillow as the decoder.

As DALI does with `exec_dynamic=False`, a run of the pipeline takes the images of the run before back,
whoever holds them. Its reader begins again behind the last file, so every batch is full.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image


class TensorCPU:
    """One image of a batch."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    def shape(self) -> list[int]:
        return list(self._pixels.shape)

    def __dlpack__(self, **_: object) -> Any:
        return self._pixels.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._pixels.__dlpack_device__()


class Pipeline:
    """What the decorated function builds."""

    def __init__(self, images: Iterator[np.ndarray], batch_size: int) -> None:
        self._images, self._batch_size = images, batch_size
        self._lent: list[np.ndarray] = []

    def run(self) -> tuple[list[TensorCPU]]:
        for pixels in self._lent:
            pixels[...] = 0xA5
        self._lent = list(itertools.islice(self._images, self._batch_size))
        return ([TensorCPU(pixels) for pixels in self._lent],)


def pipeline_def(function: Callable[[], Any]) -> Callable[..., Pipeline]:
    def build(*, batch_size: int, num_threads: int, device_id: int | None) -> Pipeline:
        return Pipeline(function(), batch_size)

    return build


def read(*, files: list[str]) -> tuple[Iterator[str], None]:
    return itertools.cycle(files), None


def decode(encoded: Iterator[str], *, device: str) -> Iterator[np.ndarray]:
    assert device == "cpu"  # "mixed" needs a GPU
    return (np.array(Image.open(file).convert("RGB")) for file in encoded)


def modules() -> dict[str, ModuleType]:
    """What to put into `sys.modules`."""
    dali = ModuleType("nvidia.dali")
    fn = SimpleNamespace(readers=SimpleNamespace(file=read), decoders=SimpleNamespace(image=decode))
    vars(dali).update(fn=fn, pipeline_def=pipeline_def)
    return {"nvidia": ModuleType("nvidia"), "nvidia.dali": dali}
