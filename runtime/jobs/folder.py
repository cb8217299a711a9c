"""`Folder`: a job's folder, on a local disk or in any storage that fsspec supports."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar
from weakref import WeakSet

from comask.errors import BackendUnavailableError, ComaskError, one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Content = TypeVar("Content")

READERS = 16  # parallel requests, since each one waits for a network
_CHAIN = re.compile(r"::[\w+.-]+://|^[\w+.-]+::")  # as in zip://a.png::s3://bucket/b.zip
HEX = "[0-9a-f]" * 32  # pattern of the random part of temporary names


class Readers:
    """A pool of reading threads. Leaving the `with` block drops pending reads and does not wait.

    Whoever waits for a dropped read gets a `CancelledError`.

    It is not a `ThreadPoolExecutor`, because the interpreter waits for an executor's threads at exit, and
    a storage may not answer for minutes.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._left = False
        self._futures: WeakSet[Future[Any]] = WeakSet()
        for _ in range(READERS):
            Thread(target=self._work, daemon=True).start()

    def submit(self, read: Callable[[str], Content], name: str) -> Future[Content]:
        """Returns the future of `read(name)`."""
        future: Future[Content] = Future()
        self._futures.add(future)

        def task() -> None:
            try:
                settle = partial(future.set_result, read(name))
            except BaseException as error:  # It is raised where the result is read.
                settle = partial(future.set_exception, error)
            with contextlib.suppress(InvalidStateError):  # The block was left meanwhile.
                settle()

        self._tasks.put(task)
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        for _thread in range(READERS):
            self._tasks.put(None)
        for future in list(self._futures):
            with contextlib.suppress(InvalidStateError):
                future.set_exception(CancelledError())

    def _work(self) -> None:
        while (task := self._tasks.get()) and not self._left:
            task()


def is_url(address: str) -> bool:
    """Returns whether `address` is an fsspec URL rather than a local path."""
    return "://" in address


def file_system(address: str) -> tuple[AbstractFileSystem, str]:
    """Returns the file system of an address, and the path in it.

    Raises:
        BackendUnavailableError: the file system's package is not installed.
        ComaskError: the file system cannot be opened.
    """
    if is_url(address) and _CHAIN.search(address):
        raise ComaskError(
            f"{address}: chained file systems are not supported; unpack the archive first"
        )
    import fsspec

    try:
        if not is_url(address):
            return fsspec.filesystem("file"), os.path.abspath(address)
        if "::" not in address:
            fs, path = fsspec.core.url_to_fs(address)
        else:  # An object's name contains "::", which `url_to_fs` would read as a chain.
            kind = fsspec.get_filesystem_class(address.partition("://")[0])
            fs, path = kind(**kind._get_kwargs_from_urls(address)), kind._strip_protocol(address)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None)  # s3fs, gcsfs, …
        fix = f": pip install {package}" if package else ""
        raise BackendUnavailableError(f"{address}: {one_line(error)}{fix}") from error
    except Exception as error:  # Each storage raises its own exceptions.
        raise ComaskError(f"{address}: cannot be opened: {one_line(error)}") from error
    return fs, str(path)


@dataclass(frozen=True)
class Folder:
    """A folder that many processes may write to at once; files are written completely or not at all.

    Attributes:
        address: a local path, or an fsspec URL.

    Raises:
        ComaskError: the storage failed; any method can raise it.
    """

    address: str

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Returns a file's bytes, or the bytes from `start` up to `end`."""
        with self._doing("read", name):
            return bytes(self._fs.cat_file(self._path(name), start=start, end=end))

    def read_each(self, names: Iterable[str]) -> Iterator[bytes]:
        """Yields the bytes of files in order, reading several of them at once."""
        with Readers() as readers:
            waiting = list(names)
            for i in range(0, len(waiting), READERS):
                coming = [readers.submit(self.read, name) for name in waiting[i : i + READERS]]
                yield from (content.result() for content in coming)

    def write(self, name: str, content: bytes) -> None:
        """Writes `content` to a file atomically: readers see all of it or nothing."""
        with self._doing("written", name):
            if self.local:
                self._replace(name, io.BytesIO(content))
            else:  # Object stores show an object once its upload is complete.
                self._remotely(name, lambda path: self._fs.pipe_file(path, content))

    def put(self, name: str, source: BinaryIO) -> None:
        """Writes the content of an open local file atomically, without loading it into memory."""
        source.flush()
        source.seek(0)
        with self._doing("written", name):
            if self.local:
                self._replace(name, source)
            else:  # Even an unnamed temporary file has a path in /dev/fd.
                self._remotely(
                    name, lambda path: self._fs.put_file(f"/dev/fd/{source.fileno()}", path)
                )

    def exists(self, name: str) -> bool:
        """Returns whether the file exists."""
        with self._doing("read", name):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._path(name)))

    def sizes(self, name: str) -> dict[str, int]:
        """Returns the size of each file in a subfolder; empty if the subfolder does not exist."""
        with self._doing("read", name):
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                entries = self._fs.ls(self._path(name), detail=True)
                return {
                    entry["name"].rsplit("/", 1)[-1]: int(entry["size"] or 0)
                    for entry in entries
                    if entry["type"] == "file"
                }
        return {}

    def sweep(self, name: str) -> None:
        """Removes the temporary files of killed writers from a subfolder."""
        if self.local:
            for path in Path(self._path(name)).glob(f".*.{HEX}.tmp"):
                path.unlink(missing_ok=True)

    @property
    def local(self) -> bool:
        """Whether the folder is on a disk of this machine."""
        return "file" in ((p,) if isinstance(p := self._fs.protocol, str) else p)

    @cached_property
    def _place(self) -> tuple[AbstractFileSystem, str]:
        return file_system(self.address)

    @property
    def _fs(self) -> Any:
        return self._place[0]

    def _path(self, name: str) -> str:
        return f"{self._place[1].rstrip('/')}/{name}"

    def _remotely(self, name: str, write: Callable[[str], object]) -> None:
        """Writes, creating missing folders, but not a missing bucket, whose name may be mistyped."""
        path = self._path(name)
        try:
            write(path)
        except FileNotFoundError:
            if not self._fs.exists("/" if path.startswith("/") else path.partition("/")[0]):
                raise
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)
            write(path)

    def _replace(self, name: str, source: BinaryIO) -> None:
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        # `whole_file` would not do: the worker of a killed driver may still be writing the same file.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _doing(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except ComaskError:
            raise
        except Exception as error:  # Each storage raises its own exceptions.
            reason = one_line(getattr(error, "strerror", None) or error)
            where = f"{self.address.rstrip('/')}/{name}"
            raise ComaskError(f"{where}: cannot be {verb}: {reason}") from error
