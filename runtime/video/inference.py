"""`Inference`: frames through a predictor's `StreamSession`, several batches at once, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence

from comask.preprocess import padded_shape, resized_shape
from comask.runtime.predictor import Predictor
from comask.runtime.session import Closing
from comask.runtime.stream import Future
from comask.runtime.video.hardware import FFMPEG_STREAM, Nv12Picture
from comask.runtime.video.source import SourceFrame
from comask.structures import Detections


class Inference(Closing):
    """Frames of one video on their way through the network; one thread at a time.

    `submit` waits for no result; on the host batches run one after the other, in another thread.

    Args:
        predictor: whose network it is.
        depth: calls of `submit` whose results may be on their way at once.
        rle: whether somebody wants RLEs, which the GPU then finds; on the host whoever wants them does.
    """

    def __init__(self, predictor: Predictor, depth: int, *, rle: bool = False) -> None:
        self._predictor, self._depth = predictor, depth
        self._session = predictor.stream(slots=depth)
        # on the host they would be found in the thread that infers, and hold it up
        self._rle = rle and predictor.stages.gpu is not None
        # of each call the frames, each with the future of its batch and its place in that
        self._submitted: deque[list[tuple[SourceFrame, Future, int]]] = deque()

    def submit(self, frames: Sequence[SourceFrame]) -> None:
        """Runs frames, together those that can: as a call of the predictor would."""
        batches: dict[Hashable, list[int]] = {}
        for number, frame in enumerate(frames):
            batches.setdefault(self._kind(frame), []).append(number)
        found: list[tuple[SourceFrame, Future, int] | None] = [None] * len(frames)
        most = self._predictor.max_batch
        for numbers in batches.values():
            for start in range(0, len(numbers), most):
                together = numbers[start : start + most]
                future = self._start([frames[number] for number in together])
                for place, number in enumerate(together):
                    found[number] = (frames[number], future, place)
        self._submitted.append([entry for entry in found if entry is not None])

    @property
    def at_work(self) -> bool:
        """Whether results are still to come."""
        return bool(self._submitted)

    def results(self, *, last: bool = False) -> Iterator[tuple[SourceFrame, Detections]]:
        """Frames with their detections, in order: those that are done, and all but `depth` - 1 calls'.

        Args:
            last: wait for all.
        """
        while self._submitted:
            frames = self._submitted[0]
            full = len(self._submitted) >= self._depth
            if not (last or full or all(future.done() for _, future, _ in frames)):
                return
            self._submitted.popleft()
            for frame, future, place in frames:
                yield frame, future.result()[place]

    def _kind(self, frame: SourceFrame) -> Hashable:
        """What is equal for frames of a batch."""
        preprocess, picture = self._predictor.preprocess, frame.picture
        canvas = padded_shape(resized_shape(frame.size, preprocess), preprocess)
        if isinstance(picture, Nv12Picture):
            return canvas, picture.matrix, picture.full_range
        return canvas

    def _start(self, frames: Sequence[SourceFrame]) -> Future:
        """Runs frames of one kind."""
        pictures = [frame.picture for frame in frames]
        nv12 = [picture for picture in pictures if isinstance(picture, Nv12Picture)]
        if not nv12:
            return self._session.submit(pictures, rle=self._rle)
        return self._session.submit(
            [picture.planes for picture in nv12],
            # the processor's backends wait for no stream, and refuse frames of a GPU
            stream=None if self._predictor.stages.gpu is None else FFMPEG_STREAM,
            format="nv12",
            matrix=nv12[0].matrix,
            full_range=nv12[0].full_range,
            rle=self._rle,
        )

    def close(self) -> None:
        """Waits for what runs and frees the session."""
        self._session.close()
