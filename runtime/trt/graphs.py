"""CUDA graphs of the stages: captured when the same shapes come again, dropped when they change."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from comask.errors import EngineError
from comask.runtime.device import Graph
from comask.runtime.trt.contexts import Contexts

CAPTURES = 2  # attempts, before graphs are given up

logger = logging.getLogger(__name__)

_capturing = threading.Lock()


class StageGraph:
    """Queues the stages of one `Contexts`, as a graph from a layout's second call on.

    The first call runs without a graph, because TensorRT may allocate and load memory then, which a
    capture does not allow. Only one graph is kept: TensorRT forbids graphs of earlier shapes once a
    context was told new ones.

    Args:
        contexts: the contexts, made with `captured` if `enabled`.
        stages: the stages that `Contexts.reserve` prepares before each call.
        enabled: whether graphs are captured at all.
    """

    def __init__(self, contexts: Contexts, stages: Sequence[str], *, enabled: bool) -> None:
        self._contexts, self._stages, self._enabled = contexts, stages, enabled
        self._graph: Graph | None = None
        # the layout that the graph was captured for, or will be captured for next time
        self._layout: object = None
        self._failures = 0

    def run(self) -> None:
        """Queues the stages; logs it if they cannot be captured.

        Raises:
            EngineError: if TensorRT does not start a stage.
        """
        layout = self._contexts.layout(self._stages)
        if self._enabled and layout != self._layout:
            self.drop()
            self._layout = layout
        elif self._enabled and self._graph is None:
            self._capture()
        if self._graph is None:
            self._contexts.enqueue(self._stages)
        else:
            self._graph.launch(self._contexts.stream)

    def drop(self) -> None:
        """Forgets the graph; the next call runs without one."""
        if self._graph is not None:
            self._graph.close()
        self._graph = self._layout = None

    def _capture(self) -> None:
        """Captures the graph, or logs why there is none.

        A single failure may come from memory that something else freed in this thread, so the next call
        tries once more.
        """
        if refusing := self._contexts.refusing_capture(self._stages):
            problem = f"TensorRT cannot capture {' and '.join(refusing)}"
            self._failures = CAPTURES
        else:
            try:
                with _no_garbage_collected():
                    self._graph = self._contexts.stream.capture(
                        lambda: self._contexts.enqueue(self._stages)
                    )
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
    with (
        _capturing
    ):  # several threads would otherwise enable collections during each other's captures
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()
