"""Finds the GPU (ctypes on the driver), and handles its memory, streams, events and graphs (pycuda).

Everything happens in the device's primary context, which PyTorch, ONNX Runtime and the owners of foreign
streams share. A context is current per thread, so every use of a `Device`'s objects, freeing them
included, must be inside `with device:`. pycuda can free an object in any thread, but only if the very
same Context object is current; therefore a process has one `Device` per GPU. Nothing is left to the
garbage collector, which would free objects in an arbitrary thread.

pycuda has neither graphs nor events on foreign streams; ctypes calls the driver for those.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
import weakref
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from comask.errors import BackendUnavailableError, EngineError
from comask.runtime.gpu import libcuda

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream
BLOCKING = 1  # CU_EVENT_BLOCKING_SYNC: a thread that waits sleeps, instead of keeping a core busy
DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING: makes recording and waiting cheaper
NOT_READY = 600  # CUDA_ERROR_NOT_READY
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
MIB = 2**20

_devices: dict[int, Device] = {}
_opening = threading.Lock()


def open_device(index: int = 0) -> Device:
    """Returns the GPU with this index, always as the same object.

    Raises:
        BackendUnavailableError: if pycuda or the driver cannot be loaded, or the GPU does not exist.
    """
    with _opening:
        if index not in _devices:
            _devices[index] = Device(index)
        return _devices[index]


class Device:
    """A GPU and its primary context, which `with device:` makes current; `open_device` creates it.

    Attributes:
        index: the GPU's index, from 0.
    """

    def __init__(self, index: int) -> None:
        try:
            self._driver: Any = importlib.import_module("pycuda.driver")
        except (ImportError, OSError) as error:
            raise BackendUnavailableError(
                f"pycuda cannot be imported ({' '.join(str(error).split())}): "
                f"pip install 'comask[gpu]', and NVIDIA's driver"
            ) from error
        try:
            self._driver.init()
            # a second object of the same context could not free what was made with the first one
            self._context = self._driver.Device(index).retain_primary_context()
        except self._driver.Error as error:
            raise BackendUnavailableError(f"GPU {index} cannot be opened: {error}") from error
        # The destructor would detach the context as if it were not a primary one, which the driver
        # refuses. Finalizers run in reverse order of creation: those that need this context come first.
        weakref.finalize(self, self._context.detach)
        self.index = index

    def __enter__(self) -> Self:
        self._context.push()
        return self

    def __exit__(self, *_: object) -> None:
        # a thread that ends with a context on pycuda's stack aborts the process
        self._driver.Context.pop()

    def memory(self, size: int) -> DeviceMemory:
        """Allocates `size` bytes, 256-byte aligned.

        Raises:
            EngineError: if the GPU does not have enough memory.
        """
        return DeviceMemory(self._allocate(self._driver.mem_alloc, size, f"GPU {self.index}"), size)

    def pinned(self, size: int) -> PinnedMemory:
        """Allocates `size` bytes of page-locked host memory, which asynchronous copies need.

        Raises:
            EngineError: if the system does not have enough memory.
        """
        allocate = functools.partial(self._driver.pagelocked_empty, dtype=np.uint8)
        return PinnedMemory(self._allocate(allocate, size, "page-locked host memory"))

    def _allocate(self, allocate: Any, size: int, where: str) -> Any:
        try:
            return allocate(size)
        except self._driver.MemoryError as error:
            raise EngineError(
                f"{where}: out of memory, cannot allocate {-(-size // MIB)} MiB more; give a smaller "
                f"max_batch (--batch), fewer slots or fewer threads, or end other programs that use it"
            ) from error

    def stream(self) -> Stream:
        """Creates a stream that waits for no other stream, not even for the default stream."""
        return Stream(self._driver)

    def synchronize(self, foreign: int) -> None:
        """Waits for the work that is now queued on another library's stream, given by its handle."""
        _call_on(foreign, "cuStreamSynchronize", ctypes.c_void_p(foreign))

    def event(self, *, timed: bool = False) -> Event:
        """Creates an event, which counts as past until it is recorded; `Event.since` needs `timed`."""
        return Event(timed=timed)


class DeviceMemory:
    """A block of a GPU's memory.

    Attributes:
        address: address of the first byte.
        size: size in bytes.
    """

    def __init__(self, allocation: Any, size: int) -> None:
        self._allocation = allocation
        self.address = int(allocation)
        self.size = size

    def free(self) -> None:
        """Frees the memory, which must not be in use."""
        self._allocation.free()


class PinnedMemory:
    """A block of page-locked host memory.

    Attributes:
        bytes: u8 [size]; neither it nor a view of it may be used after `free`.
        address: address of the first byte.
        size: size in bytes.
    """

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.bytes, self.size = array, array.size
        self.address: int = array.ctypes.data
        self._allocation: Any = array.base

    def free(self) -> None:
        """Frees the memory, which must not be in use."""
        self.bytes = np.empty(0, dtype=np.uint8)
        self._allocation.free()


class Stream:
    """A queue of work on the GPU; `Device.stream` creates it.

    Attributes:
        handle: the CUstream as an integer.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._stream = driver.Stream(NON_BLOCKING)
        self.handle = int(self._stream.handle)
        self._event = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(self._event), DISABLE_TIMING)
        self._end = Event(timed=False)

    def copy_in(self, memory: DeviceMemory, array: NDArray[Any], offset: int = 0) -> None:
        """Queues a copy from a contiguous host array, which must not change until the copy is done."""
        self._driver.memcpy_htod_async(memory.address + offset, array, self._stream)

    def copy_over(
        self, memory: DeviceMemory, address: int, offset: int = 0, size: int | None = None
    ) -> None:
        """Queues a copy from another address on the GPU, of `size` bytes or the whole memory's size."""
        size = memory.size if size is None else size
        self._driver.memcpy_dtod_async(memory.address + offset, address, size, self._stream)

    def copy_out(self, array: NDArray[Any], memory: DeviceMemory) -> None:
        """Queues a copy to a contiguous host array, of as many bytes as the array has."""
        self._driver.memcpy_dtoh_async(array, memory.address, self._stream)

    def synchronize(self) -> None:
        """Waits until all queued work is done; other threads can run meanwhile.

        Raises:
            EngineError: if some of it failed; CUDA then refuses all further calls of this process.
        """
        self._end.record(self)
        self._end.synchronize()

    def wait_for(self, foreign: int) -> None:
        """Makes later work on this stream wait for the work that is now queued on another stream.

        Args:
            foreign: handle of any library's stream in this context.

        Raises:
            EngineError: if the handle is invalid.
        """
        # a queued wait refers to the event's last record before it, so one event serves all waits
        _call_on(foreign, "cuEventRecord", self._event, ctypes.c_void_p(foreign))
        _call("cuStreamWaitEvent", ctypes.c_void_p(self.handle), self._event, 0)

    def capture(self, queue: Callable[[], None]) -> Graph:
        """Captures what `queue` queues on this stream as a graph, without running it.

        Raises:
            EngineError: if some of it cannot be captured; the stream is then unchanged.
        """
        _call("cuStreamBeginCapture_v2", ctypes.c_void_p(self.handle), THREAD_LOCAL)
        template = ctypes.c_void_p()
        try:
            queue()
        except BaseException:
            # the capture must end; an invalid one ends with an error and without a graph
            libcuda().cuStreamEndCapture(ctypes.c_void_p(self.handle), ctypes.byref(template))
            if template:
                _call("cuGraphDestroy", template)
            raise
        _call("cuStreamEndCapture", ctypes.c_void_p(self.handle), ctypes.byref(template))
        try:
            return Graph(template)
        finally:
            _call("cuGraphDestroy", template)

    def close(self) -> None:
        """Waits for the stream's work, then destroys the stream."""
        self.synchronize()
        _call("cuEventDestroy_v2", self._event)
        self._end.close()
        self._stream = None  # pycuda destroys it with its last reference


class Event:
    """A point in a stream's work; `Device.event` creates it."""

    def __init__(self, *, timed: bool) -> None:
        self._event = ctypes.c_void_p()
        flags = BLOCKING if timed else BLOCKING | DISABLE_TIMING
        _call("cuEventCreate", ctypes.byref(self._event), flags)

    def since(self, earlier: Event) -> float:
        """Returns the seconds between two timed events by the GPU's clock; both must be past."""
        milliseconds = ctypes.c_float()
        _call("cuEventElapsedTime", ctypes.byref(milliseconds), earlier._event, self._event)
        return milliseconds.value / 1000

    def record(self, stream: Stream) -> None:
        """Moves the event behind the work that is now queued on a stream."""
        _call("cuEventRecord", self._event, ctypes.c_void_p(stream.handle))

    def hold_back(self, foreign: int) -> None:
        """Makes later work on another stream, given by its handle, wait for this event.

        Raises:
            EngineError: if the handle is invalid.
        """
        _call_on(foreign, "cuStreamWaitEvent", ctypes.c_void_p(foreign), self._event, 0)

    def past(self) -> bool:
        """Returns whether the work before the event is done.

        Raises:
            EngineError: if some of it failed.
        """
        status = libcuda().cuEventQuery(self._event)
        if status not in (0, NOT_READY):
            raise EngineError(f"work on the GPU failed with {status}, start a new process")
        return bool(status == 0)

    def synchronize(self) -> None:
        """Waits until the work before the event is done; other threads can run meanwhile.

        Raises:
            EngineError: if some of it failed; CUDA then refuses all further calls of this process.
        """
        try:
            _call("cuEventSynchronize", self._event)
        except EngineError as error:
            raise EngineError(f"work on the GPU failed, start a new process: {error}") from error

    def close(self) -> None:
        """Destroys the event."""
        _call("cuEventDestroy_v2", self._event)


class Graph:
    """Captured work that is queued as a whole; `Stream.capture` creates it."""

    def __init__(self, template: ctypes.c_void_p) -> None:
        self._graph = ctypes.c_void_p()
        _call(
            "cuGraphInstantiateWithFlags",
            ctypes.byref(self._graph),
            template,
            ctypes.c_ulonglong(0),
        )

    def launch(self, stream: Stream) -> None:
        """Queues the graph's work on a stream."""
        _call("cuGraphLaunch", self._graph, ctypes.c_void_p(stream.handle))

    def close(self) -> None:
        """Destroys the graph; work that was queued before is still done."""
        _call("cuGraphExecDestroy", self._graph)


def _call(name: str, *arguments: object) -> None:
    status = getattr(libcuda(), name)(*arguments)
    if status:
        raise EngineError(f"{name} failed with {status}, a CUresult of NVIDIA's cuda.h")


def _call_on(foreign: int, name: str, *arguments: object) -> None:
    """Calls the driver about the caller's stream; an error names the stream."""
    try:
        _call(name, *arguments)
    except EngineError as error:
        raise EngineError(
            f"CUDA stream {foreign:#x} cannot be waited for: {error}; expected the handle of a stream of "
            "this GPU's primary context that still exists"
        ) from error
