"""Makes frames with PyTorch and CuPy on the GPU and reads outputs with them, each on a stream of its own.

In a rehearsal, memory and streams of ours take their place, so that the rows' code runs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from context import Context
from stand_in_session import OwnFrame, on_host
from typing_extensions import override

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGE = 2**27  # elements of an array that keeps a GPU busy
BUSY = 100  # passes over it: some ten milliseconds


class Library(Protocol):
    """A library with a stream, `stream`, on which all its work is queued."""

    stream: Any

    def frame(self, image: NDArray[np.uint8], interface: str) -> Any:
        """Returns pixels on the GPU that are written; `interface` is `dlpack` or `cai`."""

    def work(self) -> None:
        """Queues milliseconds of work."""

    def write(self, frame: Any, image: NDArray[np.uint8] | int) -> None:
        """Queues a write of a frame."""

    def read(self, shared: Any, interface: str) -> Any:
        """Queues a copy of an output, which `value` returns."""

    def value(self, copied: Any) -> NDArray[Any]:
        """Waits for a copy and returns it."""

    def wait(self) -> None:
        """Waits for all queued work."""


def library(context: Context, name: str) -> Library:
    """Returns PyTorch or CuPy, or what takes their place in a rehearsal."""
    if context.stand_in:
        return OwnLibrary()
    return TorchLibrary() if name == "torch" else CupyLibrary()


def bare(array: Any) -> Any:
    """Returns an object that has nothing of an array but `__cuda_array_interface__`."""
    return SimpleNamespace(__cuda_array_interface__=array.__cuda_array_interface__, array=array)


class TorchLibrary(Library):
    """PyTorch's CUDA tensors."""

    def __init__(self) -> None:
        import torch

        self._torch, self.stream = torch, torch.cuda.Stream()
        self._large = torch.ones(LARGE, device="cuda")
        torch.cuda.synchronize()

    @override
    def frame(self, image: NDArray[np.uint8], interface: str) -> Any:
        with self._torch.cuda.stream(self.stream):
            tensor = self._torch.from_numpy(image.copy()).cuda()
        self.wait()
        return tensor if interface == "dlpack" else bare(tensor)

    @override
    def work(self) -> None:
        with self._torch.cuda.stream(self.stream):
            for _ in range(BUSY):
                self._large.mul_(1.0)

    @override
    def write(self, frame: Any, image: NDArray[np.uint8] | int) -> None:
        tensor = getattr(frame, "array", frame)
        with self._torch.cuda.stream(self.stream):
            if isinstance(image, int):
                tensor.fill_(image)
            else:  # from the GPU: a copy from the host's memory would wait
                tensor.copy_(self._torch.from_numpy(image.copy()).pin_memory(), non_blocking=True)

    @override
    def read(self, shared: Any, interface: str) -> Any:
        with self._torch.cuda.stream(self.stream):
            if interface == "dlpack":
                return self._torch.from_dlpack(shared).clone()
            return self._torch.as_tensor(shared, device="cuda").clone()

    @override
    def value(self, copied: Any) -> NDArray[Any]:
        self.wait()
        array: NDArray[Any] = copied.cpu().numpy()
        return array

    @override
    def wait(self) -> None:
        self.stream.synchronize()


class CupyLibrary(Library):
    """CuPy's arrays."""

    def __init__(self) -> None:
        import cupy

        self._cupy, self.stream = cupy, cupy.cuda.Stream(non_blocking=True)
        self._large = cupy.ones(LARGE, dtype=np.float32)
        cupy.cuda.Device().synchronize()

    @override
    def frame(self, image: NDArray[np.uint8], interface: str) -> Any:
        with self.stream:
            array = self._cupy.asarray(image)
        self.wait()
        return array if interface == "dlpack" else bare(array)

    @override
    def work(self) -> None:
        with self.stream:
            for _ in range(BUSY):
                self._large *= 1.0

    @override
    def write(self, frame: Any, image: NDArray[np.uint8] | int) -> None:
        array = getattr(frame, "array", frame)
        with self.stream:
            if isinstance(image, int):
                array.fill(image)
            else:
                array.set(image)

    @override
    def read(self, shared: Any, interface: str) -> Any:
        with self.stream:
            if interface == "dlpack":
                return self._cupy.from_dlpack(shared).copy()
            return self._cupy.asarray(shared).copy()

    @override
    def value(self, copied: Any) -> NDArray[Any]:
        self.wait()
        return np.asarray(self._cupy.asnumpy(copied))

    @override
    def wait(self) -> None:
        self.stream.synchronize()


class OwnLibrary(Library):
    """Memory and streams of ours."""

    def __init__(self) -> None:
        from comask.runtime.device import open_device

        self._device = open_device()
        with self._device:
            self._stream = self._device.stream()
        self.stream = self._stream.handle
        self._sources: list[NDArray[np.uint8]] = []  # until the copies are done

    @override
    def frame(self, image: NDArray[np.uint8], interface: str) -> Any:
        return OwnFrame(image, interface)

    @override
    def work(self) -> None:
        """Nothing needs time: the stand-in driver does queued work as late as it can."""

    @override
    def write(self, frame: Any, image: NDArray[np.uint8] | int) -> None:
        source = np.full(frame.shape, image, np.uint8) if isinstance(image, int) else image.copy()
        self._sources.append(source)
        with self._device:
            self._stream.copy_in(frame.memory, source)

    @override
    def read(self, shared: Any, interface: str) -> Any:
        if interface == "dlpack":
            shared.__dlpack__(stream=self.stream)  # a capsule that nobody takes
            copied = np.zeros(shared.shape, shared.dtype)
            memory: Any = SimpleNamespace(address=shared.address)
            with self._device:
                self._stream.copy_out(copied, memory)
            return copied
        return on_host(shared)

    @override
    def value(self, copied: Any) -> NDArray[Any]:
        self.wait()
        return np.asarray(copied)

    @override
    def wait(self) -> None:
        with self._device:
            self._stream.synchronize()
