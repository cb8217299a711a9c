"""What a worker does: the rows of some images."""

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

READ_AGAIN_AFTER = (1.0, 4.0)  # seconds; a network may fail where the image is sound


@dataclass(frozen=True, slots=True)
class Model:
    """What is run.

    Attributes:
        bundle: its folder, on each machine that works.
        backend: see `Predictor.load`.
        options: where and how it runs.
        digest: see `bundle_digest`; None where any bundle will do.
    """

    bundle: str
    backend: str
    options: LoadOptions
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
        return Predictor.open(self.bundle, self.backend, self.options)


@dataclass(frozen=True, slots=True)
class _Coming:
    """An image whose bytes are on their way; see `_content`."""

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
        """A row for each image, in order; one that cannot be run has an `error`.

        Raises:
            ComaskError: when none of several images could be fetched, so that the storage is to blame.
            Exception: of whatever kind, when the backend is to blame.
        """
        rows, fetched = [], not any(map(is_url, addresses))

        def decode(image: _Coming) -> Pixels:
            nonlocal fetched
            try:
                data = image.content.result()
            except ImageError as error:  # a storage that answers "no such image" is not at fault
                fetched |= isinstance(error.__cause__, FileNotFoundError)
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
        """The images; bytes that are not local are on their way before they are asked for."""
        coming: deque[_Coming] = deque()
        for address in addresses:
            coming.append(_Coming(address, readers.submit(_content, address)))
            if len(coming) > 2 * self.predictor.max_batch:
                yield coming.popleft()
        yield from coming


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
