"""Runs kernels on a GPU (through CUDA's driver alone), on the CPU, and on PyTorch's tensors.

libcuda and PyTorch are loaded at the first use, so that this module can be imported without them.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from comask.errors import KernelError, KernelUnavailableError
from comask.kernels import compile
from comask.kernels.launch import Launch, pack

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEGACY_STREAM = 1  # CU_STREAM_LEGACY: the default stream, which most streams wait for
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_modules: dict[tuple[int, str], ctypes.c_void_p] = {}  # by context and source
_functions: dict[tuple[int, str], ctypes.c_void_p] = {}  # by context and entry


def prepare(source: str) -> None:
    """Compiles and loads a kernel for the current context's device ahead of its first launch.

    The kernel's functions are loaded as well, since loading is not possible while a CUDA graph is being
    captured.

    Raises:
        KernelUnavailableError: when the driver or a compiler is missing.
        KernelError: when no context is current, or the driver rejects the module.
    """
    context = _current_context()
    for entry in compile.entries(source):
        _function(context, source, entry)


def prepare_on(source: str, gpu: int | None) -> None:
    """Compiles and loads a kernel for a GPU, given by its index, or for the CPU; see `prepare`."""
    if gpu is None:
        compile.host_library(source)
        return
    use_primary_context(gpu)
    prepare(source)


def on_gpu(launch: Launch, inputs: Sequence[int], output: int, stream: int) -> None:
    """Launches a kernel in the current CUDA context and returns at once.

    Args:
        launch: a launch from `comask.kernels.launch`.
        inputs: the device addresses of the inputs.
        output: the device address of the output.
        stream: a CUstream's handle; 0 is the default stream.

    Raises:
        KernelError: when `prepare` raises one, or the driver rejects the launch.
    """
    BoundLaunch(launch).queue(inputs, output, stream)


class BoundLaunch:
    """A launch whose function is looked up and whose arguments are packed once, for many calls.

    Only one thread at a time may use it. Its context is the one that is current when it is created.

    Args:
        launch: a launch from `comask.kernels.launch`.

    Raises:
        KernelError: when `prepare` raises one.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._arguments: ctypes.Array[ctypes.c_void_p] | None = None
        if launch.grid:
            self._function = _function(_current_context(), launch.source, launch.entry)

    def queue(self, inputs: Sequence[int], output: int, stream: int) -> None:
        """Queues the kernel with these addresses; `on_gpu` explains the arguments.

        Raises:
            KernelError: when the driver rejects the launch.
        """
        launch = self._launch
        if launch.grid == 0:
            return
        if self._arguments is None:
            self._arguments = pack(launch, inputs, output)
        else:
            values = self._arguments.values  # type: ignore[attr-defined]
            for value, address in zip(values, inputs, strict=False):
                value.value = address
            values[-1].value = output
        _call(
            "cuLaunchKernel", self._function, launch.grid, 1, 1, launch.block, 1, 1, 0,
            ctypes.c_void_p(stream), self._arguments, None,
        )  # fmt: skip


def synchronize(stream: int) -> None:
    """Waits for the work that is now queued on a stream of the current context.

    Raises:
        KernelError: when some of it failed, or the driver rejects the handle.
    """
    _call("cuStreamSynchronize", ctypes.c_void_p(stream))


def use_primary_context(device: int) -> None:
    """Makes a device's primary context current if this thread has no context.

    A thread that has not called CUDA's runtime yet has no context, even if it was given arrays of one.

    Raises:
        KernelError: when the driver is missing, or the device does not exist.
    """
    if _context():
        return
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(handle), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    _call("cuCtxSetCurrent", context)


def on_host(launch: Launch, inputs: Sequence[int], output: int, threads: int = 1) -> None:
    """Runs a kernel on the CPU and returns when it is done.

    Args:
        launch: a launch from `comask.kernels.launch`.
        inputs: the addresses of the inputs, which are C-contiguous arrays.
        output: the address of the output, a C-contiguous array.
        threads: the largest number of threads to use.

    Raises:
        KernelError: when no C++ compiler is installed, or it reports an error.
    """
    entry = getattr(compile.host_library(launch.source), f"{launch.entry}_host")
    entry(launch.grid, threads, pack(launch, inputs, output))


@cache
def available(source: str, device: torch.device) -> bool:
    """Returns whether a kernel can be used on a device; if not, a warning says once why.

    Raises:
        KernelError: when driver and compiler are installed, but the kernel cannot be compiled or loaded.
    """
    import torch

    try:
        if device.type == "cpu":
            compile.host_library(source)
        elif device.type == "cuda":
            with torch.cuda.device(device):
                use_primary_context(device.index)
                prepare(source)
        else:
            raise KernelUnavailableError(f"comask has no kernels for {device.type}")
    except KernelUnavailableError as error:
        logger.warning("%s on %s falls back to torchvision: %s", source, device, error)
        return False
    return True


def on_tensors(launch: Launch, inputs: Sequence[Tensor], output: Tensor) -> None:
    """Runs a kernel on tensors; on CUDA, in the current stream of their device.

    Args:
        launch: a launch from `comask.kernels.launch`.
        inputs: the inputs, in the layouts that the launch states.
        output: the output, on the same device.

    Raises:
        KernelError: when `on_gpu` or `on_host` raises one.
    """
    on_device(launch, [t.data_ptr() for t in inputs], output.data_ptr(), output.device)


def on_device(launch: Launch, inputs: Sequence[int], output: int, device: torch.device) -> None:
    """Does the same as `on_tensors` for memory on one of PyTorch's devices, given by addresses."""
    import torch

    if device.type == "cpu":
        on_host(launch, inputs, output, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        use_primary_context(torch.cuda.current_device())
        on_gpu(launch, inputs, output, torch.cuda.current_stream().cuda_stream)


def _context() -> int | None:
    context = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(context))
    return context.value


def _current_context() -> int:
    context = _context()
    if context is None:
        raise KernelError("no CUDA context is current in this thread; make a device current first")
    return context


def _module(context: int, source: str) -> ctypes.c_void_p:
    with _lock:
        if (context, source) not in _modules:
            device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            _call("cuCtxGetDevice", ctypes.byref(device))
            _call("cuDeviceGetAttribute", ctypes.byref(major), CAPABILITY_MAJOR, device)
            _call("cuDeviceGetAttribute", ctypes.byref(minor), CAPABILITY_MINOR, device)
            image = compile.gpu_module(source, 10 * major.value + minor.value)
            module = ctypes.c_void_p()
            _call("cuModuleLoadData", ctypes.byref(module), image)
            _modules[context, source] = module
        return _modules[context, source]


def _function(context: int, source: str, entry: str) -> ctypes.c_void_p:
    function = _functions.get((context, entry))
    if function is None:
        function = ctypes.c_void_p()
        module = _module(context, source)
        _call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        _functions[context, entry] = function
    return function


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelUnavailableError(f"no CUDA driver: {error}; install NVIDIA's driver") from error
    _check(library, "cuInit", library.cuInit(0))
    return library


def _call(name: str, *arguments: object) -> None:
    library = _library()
    _check(library, name, getattr(library, name)(*arguments))


def _check(library: ctypes.CDLL, name: str, status: int) -> None:
    if status == 0:
        return
    texts = []
    for describe in (library.cuGetErrorName, library.cuGetErrorString):
        text = ctypes.c_char_p()
        describe(status, ctypes.byref(text))
        texts.append((text.value or b"unknown").decode())
    raise KernelError(f"{name} failed with {status}: {': '.join(texts)}")
