"""A batch's outputs lent out where they are, until their slot is used again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from comask.runtime.dlpack import SharedArray
from comask.runtime.trt.engine import Shape

if TYPE_CHECKING:
    from comask.runtime.trt.lane import TrtLane


class TrtLoan:
    """A batch's outputs in a lane, and the owner of what others see of them.

    Args:
        lane: that they lie in.
        batch: the number of theirs.
        outputs: address, shape and type of each, by name.
    """

    def __init__(
        self, lane: TrtLane, batch: int, outputs: dict[str, tuple[int, Shape, np.dtype[Any]]]
    ) -> None:
        self._lane, self._batch, self._outputs = lane, batch, outputs
        self._bitmaps: dict[int, tuple[int, Shape]] = {}  # by the frame's place

    def wait(self, seconds: float | None) -> bool:
        """See `Loan`."""
        return self._lane.wait(self._batch, seconds)

    def wait_on(self, stream: int) -> None:
        """See `Loan`."""
        with self._lane.changing:
            if self._lane.batches == self._batch:  # else it is done
                self._lane.hold_back(stream)

    def wait_read(self, stream: int) -> None:
        """See `Loan`."""
        with self._lane.changing:
            if self._lane.batches == self._batch:
                self._lane.hold_back_writer(stream)

    def outputs(self) -> dict[str, SharedArray]:
        """See `Loan`."""
        return {
            name: SharedArray(*what, self._lane.device, self)
            for name, what in self._outputs.items()
        }

    def bitmaps(self, place: int) -> SharedArray:
        """See `Loan`."""
        with self._lane.changing:
            self._check()
            if place not in self._bitmaps:
                self._bitmaps[place] = self._lane.bitmaps(place)
        address, shape = self._bitmaps[place]
        return SharedArray(address, shape, np.dtype(np.uint8), self._lane.device, self)

    def _check(self) -> None:
        if self._lane.closed:
            raise RuntimeError(
                "these outputs were borrowed and their session is closed: take .copy() before"
            )
        if self._lane.batches != self._batch:
            raise RuntimeError(
                "these outputs were borrowed and their slot is in use again: take .copy() in time, or "
                "more slots"
            )

    def share(self, stream: int | None) -> int:
        """See `Owner`."""
        with self._lane.changing:
            self._check()
            if stream is not None:
                self._lane.hold_back(stream)
            return self._lane.stream

    def copy(self, array: SharedArray) -> SharedArray:
        """See `Owner`."""
        with self._lane.changing:
            self._check()
            return self._lane.copy(array)
