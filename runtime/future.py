"""`Future`: what becomes of frames that a `StreamSession` took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comask.runtime.dlpack import SharedArray
from comask.runtime.lanes import Batch, Fetched, Lane, Loan
from comask.segmentation import rles_from_edges
from comask.structures import Detections

if TYPE_CHECKING:
    from comask.runtime.stream import StreamSession


def stream_handle(stream: Any) -> int:
    """The CUstream behind a handle, an object with `__cuda_stream__`, or a torch or cupy stream.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        found = stream.__cuda_stream__  # a method by now, an attribute in its first version
        return int((found() if callable(found) else found)[1])
    for name in ("cuda_stream", "ptr"):  # torch's, cupy's
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise TypeError(f"a stream is a {type(stream).__name__}; expected a handle or __cuda_stream__")


class Future:
    """What becomes of one `submit`; its methods may be called from any thread."""

    def __init__(self, session: StreamSession, batch: Batch, *, single: bool) -> None:
        self._session, self._batch, self._single = session, batch, single
        self._lane: Lane | None = None  # while it runs
        self._loan: Loan | None = None
        self._fetched: Fetched | None = None
        self._error: Exception | None = None
        self._detections: Detections | list[Detections] | None = None

    @property
    def _settled(self) -> bool:
        return self._fetched is not None or self._error is not None

    def done(self) -> bool:
        """Whether `result` would return, or raise, without waiting."""
        return self._session._advance(self)

    def result(self, timeout: float | None = None) -> Any:
        """The detections, brought to the host when first asked for.

        Args:
            timeout: seconds to wait at most.

        Returns:
            `Detections`, or a list of them where a list was submitted.

        Raises:
            TimeoutError: it takes longer.
            FrameDroppedError: a newer frame took its place.
            EngineError: the GPU failed.
        """
        self._session._settle(self, timeout)
        if self._error is not None:
            raise self._error
        if self._detections is None:
            assert self._fetched is not None
            found = self._session.predictor.detections(self._fetched.outputs, self._batch.places())
            if self._batch.rle:
                found = _with_rles(found, self._fetched)
            self._detections = found[0] if self._single else found
        return self._detections

    @property
    def outputs(self) -> dict[str, SharedArray]:
        """Stage 2's outputs by name where the backend wrote them; a consumer's stream waits for them.

        `num_detections` [B], `boxes` [B, D, 4] `xyxy` in pixels of the resized frame, `scores` [B, D],
        `labels` [B, D], `masks` [B, D, 28, 28]. On the host this waits for them, and they stay.

        On a GPU nothing waits, and they are borrowed until the slot is used again, which any use of the
        session may do once they are complete; `copy` waits for them and keeps them. What a consumer
        queued by then, on the stream that it gave to `__dlpack__` or that was given to `wait_on`, still
        reads these values: the slot's next batch comes behind it, so the stream must live until then.
        `__cuda_array_interface__` does not say who reads: call `wait_on` with the stream that does.

        Raises:
            RuntimeError: the frame waits for a slot.
            FrameDroppedError: a newer frame took its place.
        """
        return self._borrowed().outputs()

    def bitmaps(self, place: int = 0) -> SharedArray:
        """Masks of one frame in its own pixels, where the outputs are and borrowed as they are.

        On a GPU nothing waits: the pasting is queued behind the network, and how many masks there are is
        known there alone. They are those of `Detections.masks`.

        Args:
            place: of the frame, where a list was submitted.

        Returns:
            u8 [D, h, w], 1 inside of a mask; zeros from `num_detections` on.

        Raises:
            IndexError: there is no such frame.
            RuntimeError: the frame waits for a slot, or the outputs' slot is in use again.
            FrameDroppedError: a newer frame took its place.
            EngineError: there is no memory for them.
        """
        if not 0 <= place < len(self._batch.frames):
            raise IndexError(f"no frame {place} in a batch of {len(self._batch.frames)}")
        return self._borrowed().bitmaps(place)

    def _borrowed(self) -> Loan:
        with self._session._changed:
            if self._error is not None:
                raise self._error
            if self._loan is None:
                raise RuntimeError("this frame waits for a slot: it has no outputs before result()")
            return self._loan

    def wait_on(self, stream: Any) -> None:
        """Later work on the caller's stream starts after this batch; only on the host the caller waits.

        Args:
            stream: see `StreamSession.submit`.

        Raises:
            RuntimeError: the frame waits for a slot.
            EngineError: the stream is none.
        """
        if (loan := self._begun()) is not None:
            loan.wait_on(stream_handle(stream))

    def wait_read(self, stream: Any) -> None:
        """Later work on the caller's stream starts after the frames were read, and may overwrite them.

        Args:
            stream: see `StreamSession.submit`.

        Raises:
            RuntimeError: the frame waits for a slot.
            EngineError: the stream is none.
        """
        if (loan := self._begun()) is not None:
            loan.wait_read(stream_handle(stream))

    def _begun(self) -> Loan | None:
        """None for what will never run."""
        with self._session._changed:
            if self._loan is None and not self._settled:
                raise RuntimeError("this frame waits for a slot: there is nothing to wait on yet")
            return self._loan


def _with_rles(found: list[Detections], fetched: Fetched) -> list[Detections]:
    if fetched.edges is None:
        rles = [detections.to_rle() for detections in found]
    else:
        rles = [
            rles_from_edges(counts[: len(detections)], edges, detections.image_size)
            for detections, (counts, edges) in zip(found, fetched.edges, strict=True)
        ]
    return [d.with_rles(r) for d, r in zip(found, rles, strict=True)]
