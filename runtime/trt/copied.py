"""Device memory that outlives its session, freed with the last array that uses it."""

from __future__ import annotations

import weakref

from comask.runtime.device import Device, DeviceMemory
from comask.runtime.dlpack import SharedArray


class CopiedMemory:
    """The owner of a copied output; all work on it is done.

    Args:
        device: of the memory.
        memory: its own from here on.
    """

    def __init__(self, device: Device, memory: DeviceMemory) -> None:
        self._device, self._memory = device, memory
        weakref.finalize(self, _free, device, memory)

    def shared(self, like: SharedArray) -> SharedArray:
        """It as an array of the same shape and type as another."""
        return SharedArray(self._memory.address, like.shape, like.dtype, like.device, self)

    def share(self, stream: int | None) -> int | None:
        """Nothing to wait for."""
        return None

    def copy(self, array: SharedArray) -> SharedArray:
        """See `SharedArray.copy`."""
        with self._device:
            memory, stream = self._device.memory(self._memory.size), self._device.stream()
            stream.copy_over(memory, self._memory.address)
            stream.close()
        return CopiedMemory(self._device, memory).shared(array)


def _free(device: Device, memory: DeviceMemory) -> None:
    with device:
        memory.free()
