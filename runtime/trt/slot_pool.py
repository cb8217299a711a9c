"""A pool of slots over one pair of engines."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from comask.runtime.device import Device
from comask.runtime.trt.engine import Engine, Flavor
from comask.runtime.trt.slot import Slot


class SlotPool:
    """Slots over one pair of engines, made as threads come, at most `size`; a call borrows one.

    Closed at the latest when it is collected or when the process ends, while CUDA still works.

    Args:
        device: to run on.
        flavor: of the engines.
        runtime: that the engines came from.
        engines: by stage; the pool closes them.
        size: how many slots there may be but for lent ones, so how many calls run at once.
        proposals: see `Stages`.

    Attributes:
        device: see above.
    """

    def __init__(
        self,
        device: Device,
        flavor: Flavor,
        runtime: Any,
        engines: Mapping[str, Engine],
        size: int,
        proposals: int | None = None,
    ) -> None:
        self.device, self._flavor, self._engines, self._size = device, flavor, engines, size
        self._proposals = proposals
        self._permits = threading.Semaphore(size)
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._slots: list[Slot] = []
        self._idle: list[Slot] = []
        self._free = weakref.finalize(
            self, _free_all, device, self._slots, self._idle, dict(engines), [runtime]
        )

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """A slot of one's own with its device current; waits for one where all are taken.

        Raises:
            RuntimeError: when the pool is closed.
            EngineError: when there is no memory for another slot.
        """
        with self._permits, self.device:
            with self._lock:
                if not self._free.alive:
                    raise RuntimeError("this backend is closed")
                slot = self._idle.pop() if self._idle else self._new_slot()
            try:
                yield slot
            finally:
                self._idle.append(slot)

    def _new_slot(self) -> Slot:
        slot = Slot(self.device, self._flavor, self._engines, self._proposals)
        self._slots.append(slot)
        return slot

    def lend(self, count: int) -> list[Slot]:
        """More slots, for as long as the pool is open or until they come back.

        Raises:
            RuntimeError: when the pool is closed.
            EngineError: when there is no memory for them.
        """
        with self._lock, self.device:
            if not self._free.alive:
                raise RuntimeError("this backend is closed")
            with ExitStack() as undo:
                lent: list[Slot] = []
                undo.callback(self._drop, lent)
                for _ in range(count):
                    lent.append(self._new_slot())
                undo.pop_all()
            return lent

    def take_back(self, slots: Sequence[Slot]) -> None:
        """Frees slots that were lent; no call may be running."""
        with self._lock, self.device:
            self._drop(slots)

    def _drop(self, slots: Sequence[Slot]) -> None:
        with ExitStack() as stack:  # an error stops none of it
            for slot in slots:
                if slot in self._slots:  # else the pool was closed first
                    self._slots.remove(slot)
                    stack.callback(slot.close)

    def close(self) -> None:
        """Waits for running calls and frees slots and engines; again is harmless."""
        with self._closing:  # two closers with a permit each would wait for one another
            for _ in range(self._size):
                self._permits.acquire()
            self._free()
            self._permits.release(self._size)


def _free_all(
    device: Device,
    slots: list[Slot],
    idle: list[Slot],
    engines: dict[str, Engine],
    runtime: list[Any],
) -> None:
    """In the order that TensorRT asks for: contexts, engines, runtime."""
    with device:
        idle.clear()
        for slot in slots:
            slot.close()
        slots.clear()
        for engine in engines.values():
            engine.close()
        engines.clear()
        runtime.clear()
