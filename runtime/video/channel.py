"""`Channel`: a bounded queue between two threads that either of them can end."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Channel(Generic[Item]):
    """Hands items from one thread to another.

    Every method may be called from a signal handler: the lock is one that its own thread may take again.

    Args:
        size: items that wait at most.
        drop_oldest: when `size` items wait, `put` discards the oldest instead of waiting.
    """

    def __init__(self, size: int, *, drop_oldest: bool = False) -> None:
        self._size, self._drop_oldest = size, drop_oldest
        self._items: deque[Item] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._closed = self._cancelled = False
        self._error: BaseException | None = None
        self.dropped = 0

    def put(self, item: Item) -> bool:
        """Hands over `item`, waiting for room; False when the receiver wants no more."""
        with self._changed:
            while len(self._items) >= self._size and not self._cancelled:
                if self._drop_oldest:
                    self._items.popleft()
                    self.dropped += 1
                else:
                    self._changed.wait()
            if self._cancelled:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def ready(self, count: int = 1, timeout: float | None = None) -> bool:
        """Whether `take` returns at once, waiting for that at most `timeout` seconds."""
        with self._changed:
            wanted = min(count, self._size)
            return self._changed.wait_for(
                lambda: len(self._items) >= wanted or self._closed, timeout
            )

    def take(self, count: int = 1) -> list[Item]:
        """The next `count` items, waiting for them; fewer at the end, and none after it.

        Raises:
            BaseException: what `close` was given, after the last item.
        """
        with self._changed:
            self.ready(count)
            taken = [self._items.popleft() for _ in range(min(count, len(self._items)))]
            self._changed.notify_all()
            if not taken and self._error is not None:
                raise self._error
            return taken

    def close(self, error: BaseException | None = None) -> None:
        """The sender's end: no item follows. What waits is still taken, then `error` is raised."""
        with self._changed:
            self._closed = True
            self._error = self._error or error
            self._changed.notify_all()

    def cancel(self) -> None:
        """The receiver's end: what waits is discarded, and `put` returns False from now on."""
        with self._changed:
            self._closed = self._cancelled = True
            self._items.clear()
            self._changed.notify_all()
