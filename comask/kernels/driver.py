"""Launching kernels on CUDA through the driver alone, in whatever context is current.

libcuda is opened at the first use; this module can be imported without it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache

from comask.errors import KernelError, KernelUnavailableError
from comask.kernels import compile
from comask.kernels.launch import Launch, pack

CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute

_lock = threading.Lock()
_modules: dict[tuple[int, str], ctypes.c_void_p] = {}  # by context and source
_functions: dict[tuple[int, str], ctypes.c_void_p] = {}  # by context and entry


def prepare(source: str) -> None:
    """Compiles a kernel for the current context's device and loads it, ahead of its first launch.

    Its functions are fetched as well: a CUDA graph that is being captured allows no loading.

    Raises:
        KernelUnavailableError: no driver or no compiler.
        KernelError: no current context, or the driver refuses the module.
    """
    context = _current_context()
    for entry in compile.entries(source):
        _function(context, source, entry)


def launch(launch: Launch, inputs: Sequence[int], output: int, stream: int) -> None:
    """Launches a kernel in the current context and returns at once.

    Args:
        launch: from `comask.kernels.launch`.
        inputs: device addresses.
        output: device address.
        stream: a CUstream's handle; 0 is the default stream.

    Raises:
        KernelError: as `prepare`, or the driver refuses the launch.
    """
    if launch.grid == 0:
        return
    function = _function(_current_context(), launch.source, launch.entry)
    arguments = pack(launch, inputs, output)
    _call(
        "cuLaunchKernel", function, launch.grid, 1, 1, launch.block, 1, 1, 0,
        ctypes.c_void_p(stream), arguments, None,
    )  # fmt: skip


def use_primary_context(device: int) -> None:
    """Makes a device's primary context current, if this thread has no context.

    A thread that has not called CUDA's runtime yet has none, though it was handed arrays of one.

    Raises:
        KernelError: no driver or no such device.
    """
    if _context():
        return
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(handle), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    _call("cuCtxSetCurrent", context)


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
            image = compile.cubin(source, 10 * major.value + minor.value)
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
