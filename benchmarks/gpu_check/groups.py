"""Lists the groups of rows in the order in which they run: the longest and least sure come last."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rows import Check


@dataclass(frozen=True)
class Group:
    """Rows that share a process.

    Attributes:
        name: what `--groups` takes.
        module: the module whose `checks` returns the rows.
        seconds: the estimated time on a GPU.
        rehearsed: in a rehearsal, PyTorch's CPU or the stand-ins of `tests` take the place of the GPU.
        imports: modules to import before the first row, so that its time is its own.
        flavor: the TensorRT that a group of engines is about.
        tensorrt_stood_in: whether the stand-in TensorRT is used also on a GPU, whose memory and streams
            are real.
    """

    name: str
    module: str
    seconds: int
    rehearsed: Literal["cpu", "stand-in"] = "cpu"
    imports: tuple[str, ...] = ("torch",)
    flavor: str = ""
    tensorrt_stood_in: bool = False

    def checks(self) -> Sequence[Check]:
        """Returns the rows in their order."""
        made = importlib.import_module(self.module).checks
        return list(made(self.flavor) if self.flavor else made())


GROUPS = (
    Group("kernels", "kernel_values", 20),
    Group("device", "device", 10, "stand-in"),
    Group("bundle", "trained_bundle", 5),
    Group("streams", "streams", 30, "stand-in", tensorrt_stood_in=True),
    Group("frames", "shared_frames", 15, "stand-in", tensorrt_stood_in=True),
    Group("network", "network", 30),
    Group("times", "kernel_times", 15),
    Group("training", "training", 45),
    Group("video", "video", 15, "stand-in", tensorrt_stood_in=True),
    Group("runtimes", "runtimes", 100, "stand-in"),
    Group("onnxruntime", "onnxruntime_cuda", 60),
    Group("tensorrt-rtx", "engines", 150, "stand-in", flavor="tensorrt-rtx"),
    Group("tensorrt", "engines", 240, "stand-in", flavor="tensorrt"),
    Group("int8", "int8", 240),
)
