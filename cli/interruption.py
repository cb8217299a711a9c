"""`Interruption`: a job that a signal ends after the file in hand."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


class Interruption:
    """Turns SIGINT and SIGTERM into a request to stop; the second one ends the process as usual.

    Attributes:
        signal: the number of the one that came, 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextlib.contextmanager
    def on_signal(self, stop: Callable[[], None] | None = None) -> Iterator[None]:
        """In this block, a signal sets `signal`, and calls `stop`."""
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def received(number: int, frame: FrameType | None) -> None:
            self.signal = number
            restore()
            if stop is not None:
                stop()

        for number in before:
            signal.signal(number, received)
        try:
            yield
        finally:
            restore()
