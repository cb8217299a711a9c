"""Launching kernels on PyTorch's tensors, on the CPU and on CUDA alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from comask.errors import KernelUnavailableError
from comask.kernels import compile, driver, host
from comask.kernels.launch import Launch

logger = logging.getLogger(__name__)


@cache
def available(source: str, device: torch.device) -> bool:
    """Whether a kernel can be used on a device; the first time it cannot, a warning says why.

    Raises:
        KernelError: the machine has all that it takes, and the kernel fails nevertheless.
    """
    try:
        if device.type == "cpu":
            compile.host_library(source)
        elif device.type == "cuda":
            with torch.cuda.device(device):
                driver.use_primary_context(device.index)
                driver.prepare(source)
        else:
            raise KernelUnavailableError(f"comask has no kernels for {device.type}")
    except KernelUnavailableError as error:
        logger.warning("%s on %s falls back to torchvision: %s", source, device, error)
        return False
    return True


def launch(launch: Launch, inputs: Sequence[Tensor], output: Tensor) -> None:
    """Runs a kernel; on CUDA, on the current stream of the tensors' device.

    Args:
        launch: from `comask.kernels.launch`.
        inputs: tensors of the layouts that it names.
        output: likewise, on the same device.

    Raises:
        KernelError: as `driver.launch` and `host.launch`.
    """
    addresses = [tensor.data_ptr() for tensor in inputs]
    if output.device.type == "cpu":
        host.launch(launch, addresses, output.data_ptr(), torch.get_num_threads())
        return
    with torch.cuda.device(output.device):
        driver.use_primary_context(output.device.index)
        stream = torch.cuda.current_stream().cuda_stream
        driver.launch(launch, addresses, output.data_ptr(), stream)
