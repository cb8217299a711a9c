"""Launching kernels on the CPU: the same source, compiled by g++."""

from __future__ import annotations

from collections.abc import Sequence

from comask.kernels.compile import host_library
from comask.kernels.launch import Launch, pack


def launch(launch: Launch, inputs: Sequence[int], output: int, threads: int = 1) -> None:
    """Runs a kernel and returns when it is done.

    Args:
        launch: from `comask.kernels.launch`.
        inputs: addresses of C-contiguous arrays.
        output: likewise.
        threads: the most to use.

    Raises:
        KernelError: there is no C++ compiler.
    """
    entry = getattr(host_library(launch.source), f"{launch.entry}_host")
    entry(launch.grid, threads, pack(launch, inputs, output))
