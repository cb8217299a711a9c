"""A pool of execution contexts over one pair of engines: calls borrow them, sessions have lanes made."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from comask.runtime.device import Device
from comask.runtime.trt.contexts import Contexts
from comask.runtime.trt.engine import Engine
from comask.runtime.trt.flavor import Flavor

Lent = TypeVar("Lent")


class ContextPool:
    """A pool of at most `size` `Contexts` of one pair of engines, created on demand; a call borrows one.

    The pool is closed at the latest when it is collected or the process ends, while CUDA still works.

    Args:
        device: the device to run on.
        flavor: the engines' flavor.
        runtime: the TensorRT runtime that deserialised the engines.
        engines: the engine of each stage; the pool closes them.
        size: the number of calls that may run at once.
        proposals: see `Stages`.

    Attributes:
        device: the device.
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
        self.device, self._size = device, size
        self._parts = device, flavor, engines, proposals
        self._permits = threading.Semaphore(size)
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._all: list[Any] = []
        self._idle: list[Contexts] = []
        self._free = weakref.finalize(
            self, _free_all, device, self._all, self._idle, dict(engines), [runtime]
        )

    @contextmanager
    def contexts(self) -> Iterator[Contexts]:
        """Lends contexts to the caller, with their device current; waits while all are taken.

        Raises:
            RuntimeError: if the pool is closed.
            EngineError: if memory for further contexts runs out.
        """
        with self._permits, self.device:
            with self._lock:
                contexts = self._idle.pop() if self._idle else self._made(Contexts)
            try:
                yield contexts
            finally:
                self._idle.append(contexts)

    def lend(self, make: Callable[..., Lent]) -> Lent:
        """Creates an object that uses the engines, until `take_back` is called or the pool is closed.

        Args:
            make: called with the arguments of `Contexts`; returns an object with `close`.

        Raises:
            RuntimeError: if the pool is closed.
            EngineError: if memory for the object runs out.
        """
        with self._lock, self.device:
            return self._made(make)

    def _made(self, make: Callable[..., Lent]) -> Lent:
        if not self._free.alive:
            raise RuntimeError("this backend is closed")
        made = make(*self._parts)
        self._all.append(made)
        return made

    def take_back(self, lent: Any) -> None:
        """Closes a lent object unless the pool did so before; no call of it may be running."""
        with self._lock, self.device:
            if lent in self._all:
                self._all.remove(lent)
                lent.close()

    def close(self) -> None:
        """Waits for running calls, then frees contexts and engines; a second call does nothing."""
        with self._closing:  # two closing threads with one permit each would deadlock
            for _ in range(self._size):
                self._permits.acquire()
            self._free()
            self._permits.release(self._size)


def _free_all(
    device: Device,
    made: list[Any],
    idle: list[Contexts],
    engines: dict[str, Engine],
    runtime: list[Any],
) -> None:
    """Frees everything in the order that TensorRT requires: contexts, engines, runtime."""
    with device:
        idle.clear()
        for lent in reversed(made):  # lanes before the stream that they wait for
            lent.close()
        made.clear()
        for engine in engines.values():
            engine.close()
        engines.clear()
        runtime.clear()
