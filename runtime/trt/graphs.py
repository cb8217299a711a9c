"""CUDA graphs: work that is captured when the same shapes come again, and dropped when they change."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from comask.errors import EngineError
from comask.runtime.device import Graph, Stream

# Who captures the stages: nobody, TensorRT-RTX (each stage by itself), or comask (both as one graph).
Graphs: TypeAlias = Literal["none", "internal", "captured"]
CAPTURES = 2  # attempts, before graphs are given up

logger = logging.getLogger(__name__)

_capturing = threading.Lock()


def graphs_of_calls(trt: Any) -> Graphs:
    """Returns who captures calls whose shapes may change every time.

    TensorRT-RTX captures by itself where it can. It goes on to compile kernels in the background then,
    whereas a capture of ours would need them beforehand.
    """
    return "internal" if hasattr(trt, "CudaGraphStrategy") else "captured"


class RepeatedWork:
    """Queues work on a stream, as a CUDA graph from a layout's second call on.

    The first call runs without a graph, because TensorRT may allocate and load memory then, which a
    capture does not allow. Only one graph is kept: TensorRT forbids graphs of earlier shapes once a
    context was told new ones.

    Args:
        stream: the stream.
        enabled: whether graphs are captured at all.
    """

    def __init__(self, stream: Stream, *, enabled: bool) -> None:
        self._stream, self._enabled = stream, enabled
        self._graph: Graph | None = None
        # the layout that the graph was captured for, or will be captured for next time
        self._layout: object = None
        self._failures = 0

    def run(
        self, layout: object, queue: Callable[[], None], refusing: Callable[[], list[str]]
    ) -> None:
        """Queues the work; logs it if the work cannot be captured.

        Args:
            layout: what the work depends on: all shapes and addresses.
            queue: queues the work on the stream.
            refusing: returns the names of the parts that cannot be captured.

        Raises:
            EngineError: if `queue` fails.
        """
        if self._enabled and layout != self._layout:
            self.drop()
            self._layout = layout
        elif self._enabled and self._graph is None:
            self._capture(queue, refusing)
        if self._graph is None:
            queue()
        else:
            self._graph.launch(self._stream)

    def drop(self) -> None:
        """Forgets the graph; the next call runs without one."""
        if self._graph is not None:
            self._graph.close()
        self._graph = self._layout = None

    def _capture(self, queue: Callable[[], None], refusing: Callable[[], list[str]]) -> None:
        """Captures the graph, or logs why that failed.

        A single failure may come from memory that something else freed in this thread, so the next call
        tries once more.
        """
        if parts := refusing():
            problem = f"TensorRT cannot capture {' and '.join(parts)}"
            self._failures = CAPTURES
        else:
            try:
                with _no_garbage_collected():
                    self._graph = self._stream.capture(queue)
                return
            except EngineError as error:
                problem = f"capture failed: {error}"
                self._failures += 1
        if self._failures < CAPTURES:
            logger.info("one call runs without a CUDA graph, %s", problem)
        else:
            logger.warning("running without CUDA graphs from now on, %s", problem)
            self._enabled = False


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Keeps Python from collecting garbage: freeing a GPU's memory would make a capture invalid."""
    # otherwise, one thread would enable collections during another one's capture
    with _capturing:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()
