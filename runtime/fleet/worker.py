"""What a worker does: the rows of some images."""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from comask.runtime.fleet.folder import READERS, file_system, is_url
from comask.runtime.fleet.job import bundle_digest
from comask.runtime.fleet.rows import Row, failed_row, found_row

from comask.errors import BundleError, ComaskError, ImageError, one_line
from comask.preprocess import decode_image

if TYPE_CHECKING:
    from comask.runtime.predictor import Predictor

    from comask.preprocess import Pixels, Prepared
    from comask.structures import Detections

READ_AGAIN_AFTER = (1.0, 4.0)  # seconds; a network may fail where the image is sound


@dataclass(frozen=True, slots=True)
class Model:
    """What is run.

    Attributes:
        bundle: its folder, on each machine that works.
        backend: see `Predictor.load`.
        settings: its other arguments.
        digest: see `bundle_digest`; None where any bundle will do.
    """

    bundle: str
    backend: str
    settings: dict[str, Any]
    digest: str | None = None

    def load(self) -> Predictor:
        """See `Predictor.load`.

        Raises:
            BundleError: also when the bundle on this machine is another one.
        """
        from comask.runtime.predictor import Predictor

        if self.digest and self.digest != bundle_digest(Path(self.bundle), self.backend):
            raise BundleError(
                f"{self.bundle}: on {platform.node()} is another bundle than the job's: "
                f"copy it to the same place on each machine"
            )
        return Predictor.load(self.bundle, self.backend, **self.settings)


class Worker:
    """Runs images in this process.

    Args:
        predictor: the loaded model.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        side = predictor.preprocess.short_side
        # a black image, which only engines of few sizes refuse, until one ran that is none
        self._sound = predictor.prepare(np.zeros((side, side, 3), dtype=np.uint8))

    def __call__(self, addresses: list[str]) -> list[Row]:
        """A row for each image, in order; one that cannot be run has an `error`.

        Raises:
            Exception: of whatever kind, when it is not the images that are to blame.
        """
        rows = []
        for window in self._read(addresses):
            prepared: dict[str, Prepared] = {}
            failed: dict[str, str] = {}
            for address, content in window:
                try:
                    prepared[address] = self.predictor.prepare(_decoded(address, content))
                except ImageError as error:
                    failed[address] = one_line(error)
            found = dict(zip(prepared, self._found(list(prepared.items())), strict=True))
            for address, _ in window:
                result = failed.get(address) or found[address]
                if isinstance(result, str):
                    rows.append(failed_row(address, result))
                else:
                    rows.append(found_row(address, result))
        return rows

    def check(self) -> None:
        """Runs an image that is not to blame: the last one that could be run, or a black one.

        Raises:
            Exception: of whatever kind, when that is impossible.
        """
        self.predictor.predict_prepared([self._sound])

    def _found(self, images: list[tuple[str, Prepared]]) -> list[Detections | str]:
        """Detections of each image, or what is wrong with it."""
        try:
            found = self.predictor.predict_prepared([image for _, image in images])
        # Memory, an engine's largest canvas, …: backends have no kind of error in common.
        except Exception as error:
            if len(images) > 1:  # the others of the batch may be sound
                return [result for image in images for result in self._found([image])]
            self.check()
            return [f"{images[0][0]}: cannot be run: {one_line(error)}"]
        if images:
            self._sound = images[-1][1]
        return list(found)

    def _read(self, addresses: list[str]) -> Iterator[list[tuple[str, Future[bytes | None]]]]:
        """Windows of images with the bytes of those that are not local, the next one on its way."""
        size = 2 * self.predictor.max_batch
        with ThreadPoolExecutor(READERS) as pool:
            here: list[tuple[str, Future[bytes | None]]] = []
            for start in range(0, len(addresses), size):
                window = addresses[start : start + size]
                coming = [(address, pool.submit(_content, address)) for address in window]
                if here:
                    yield here
                here = coming
            yield here


def _content(address: str) -> bytes | None:
    """The bytes of an image; None for a local one, which is read when it is decoded."""
    if not is_url(address):
        return None
    waits = iter(READ_AGAIN_AFTER)
    while True:
        try:
            fs, path = file_system(address)
            return bytes(fs.cat_file(path))
        except Exception as error:  # each storage has its own kinds
            lasting = isinstance(error, ComaskError | FileNotFoundError | PermissionError)
            wait = None if lasting else next(waits, None)
            if wait is None:
                raise ImageError(f"{address}: cannot be read: {_reason(error)}") from error
            time.sleep(wait)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)  # whose text is but the path again
    return one_line(error)


def _decoded(address: str, content: Future[bytes | None]) -> Pixels:
    data = content.result()
    if data is None:
        return decode_image(address)
    try:
        return decode_image(data)
    except ImageError as error:
        raise ImageError(f"{address}: {error}") from error
