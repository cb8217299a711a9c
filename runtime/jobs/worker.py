"""`Worker`: runs images and returns their rows."""

from __future__ import annotations

import errno
import os
import platform
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comask.errors import BundleError, ComaskError, ImageError, one_line
from comask.preprocess import decode_image
from comask.runtime.backends import LoadOptions
from comask.runtime.jobs.folder import Readers, file_system, is_url
from comask.runtime.jobs.job import Row, bundle_digest, failed_row, found_row

if TYPE_CHECKING:
    from comask.preprocess import Pixels
    from comask.runtime.predictor import Predictor

READ_AGAIN_AFTER = (1.0, 4.0)  # seconds; a network may fail even if the image is intact


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle to run, with its options.

    Attributes:
        bundle: the bundle's folder, on every machine.
        backend: the backend's name, see `Predictor.load`.
        options: the options of loading.
        digest: the expected `bundle_digest`; None for any bundle.
    """

    bundle: str
    backend: str
    options: LoadOptions
    digest: str | None = None

    def load(self) -> Predictor:
        """Loads the bundle, like `Predictor.load`.

        Raises:
            BundleError: the bundle cannot be read, or it differs from the job's bundle.
        """
        from comask.runtime.predictor import Predictor

        if self.digest and self.digest != bundle_digest(Path(self.bundle), self.backend):
            raise BundleError(
                f"{self.bundle}: differs on {platform.node()} from the job's bundle: copy the job's "
                f"bundle to the same place on every machine"
            )
        return Predictor.open(self.bundle, self.backend, self.options)


@dataclass(frozen=True, slots=True)
class _Coming:
    """An image whose bytes are being read, see `_content`."""

    address: str
    content: Future[bytes | None]

    def __str__(self) -> str:
        return self.address


class Worker:
    """Runs images in this process.

    Args:
        predictor: the loaded model.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def __call__(self, addresses: list[str]) -> list[Row]:
        """Returns a row for each image, in order; the row of an image that cannot be run has an `error`.

        Raises:
            ComaskError: none of several images could be fetched, so the storage has failed.
            Exception: the backend has failed.
        """
        rows, fetched = [], not any(map(is_url, addresses))

        def decode(image: _Coming) -> Pixels:
            nonlocal fetched
            try:
                data = image.content.result()
            except ImageError as error:  # A storage that reports a missing image works.
                if isinstance(error.__cause__, FileNotFoundError):
                    fetched = True
                raise
            fetched = True
            return decode_image(image.address if data is None else data, name=image.address)

        with Readers() as readers:
            for result in self.predictor.map(self._coming(addresses, readers), decode):
                address = result.item.address
                if result.error:
                    rows.append(failed_row(address, one_line(result.error)))
                else:
                    rows.append(found_row(address, result.detections))
        if not fetched and len(rows) > 1:
            raise ComaskError(f"none of {len(rows)} images can be fetched: {rows[0]['error']}")
        return rows

    def _coming(self, addresses: list[str], readers: Readers) -> Iterator[_Coming]:
        """Yields the images, and reads the bytes of remote ones ahead."""
        coming: deque[_Coming] = deque()
        for address in addresses:
            coming.append(_Coming(address, readers.submit(_content, address)))
            if len(coming) > 2 * self.predictor.max_batch:
                yield coming.popleft()
        yield from coming


def _content(address: str) -> bytes | None:
    """Returns the bytes of an image; None for a local one, which is read when it is decoded."""
    if not is_url(address):
        return None
    waits = iter(READ_AGAIN_AFTER)
    while True:
        try:
            fs, path = file_system(address)
            return bytes(fs.cat_file(path))
        except Exception as error:  # Each storage raises its own exceptions.
            lasting = isinstance(error, ComaskError | FileNotFoundError | PermissionError)
            wait = None if lasting else next(waits, None)
            if wait is None:
                raise ImageError(f"{address}: cannot be read: {_reason(error)}") from error
            time.sleep(wait)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)  # The error's own text is only the path.
    return one_line(error)
