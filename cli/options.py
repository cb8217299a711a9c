"""What the commands share: how they fail, find files and name data sets."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click

from comask import __version__
from comask.errors import ComaskError, is_out_of_memory, one_line
from comask.whole_file import write_whole

MENDS = {
    errno.EROFS: "; take a folder that can be written, and copy a bundle there",
    errno.EACCES: "; ask for the right to read or write there, or take another folder",
    errno.ENOSPC: "; free space, or take another disk",
}
EXTRAS = {  # that brings a package which a command may find missing
    **dict.fromkeys(("torch", "torchvision", "safetensors", "matplotlib"), "train"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}


def command(function: Callable[..., None]) -> click.Command:
    """A click command that turns a ComaskError into one line and exit code 1.

    With --verbose the traceback follows. Wrong usage exits with 2, as click does.
    """

    @click.command(
        name=function.__module__.rsplit(".", 1)[-1],
        help=function.__doc__,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    @click.option("-v", "--verbose", is_flag=True, help="Say more; show tracebacks.")
    @click.version_option(__version__, prog_name="comask")
    @functools.wraps(function)
    def run(*, verbose: bool, **arguments: Any) -> None:
        logging.basicConfig(
            level=logging.INFO if verbose else logging.WARNING, format="%(message)s"
        )
        try:
            with _ended_by_sigterm():
                function(**arguments)
        except ComaskError as error:
            if verbose:
                raise
            click.echo(f"error: {one_line(error)}", err=True)
            sys.exit(1)
        except OSError as error:  # a full disk, a folder that may not be written
            if verbose or error.strerror is None:
                raise
            where = f"{error.filename}: " if error.filename else ""
            mend = MENDS.get(error.errno or 0, "")
            click.echo(f"error: {one_line(where + error.strerror + mend)}", err=True)
            sys.exit(1)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if verbose or package not in EXTRAS:
                raise
            extra = "export" if function.__module__ == "comask.cli.export" else EXTRAS[package]
            click.echo(
                f"error: {package} is not installed: pip install 'comask[{extra}]'", err=True
            )
            sys.exit(1)
        except (MemoryError, RuntimeError) as error:
            if verbose or not is_out_of_memory(error):
                raise
            click.echo(f"error: not enough memory: take less at once ({one_line(error)})", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except _TerminatedError as error:
            click.echo("terminated", err=True)
            sys.exit(error.code)

    return run


class _TerminatedError(SystemExit):
    """SIGTERM came. No Exception, which libraries catch."""


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that half-written folders are cleared."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only there may signals be handled
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _TerminatedError(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def json_option(function: Callable[..., None]) -> Callable[..., None]:
    """`--json FILE`, `-` for standard output."""
    option = click.option("--json", "json_file", metavar="FILE", help="Write the result as JSON.")
    return option(function)


def check_folders(**files: str | Path | None) -> None:
    """Whether there are folders for what long work will end with, by the names of its options.

    Raises:
        ComaskError: there is one missing.
    """
    for option, file in files.items():
        if file is not None and file != "-" and not Path(file).resolve().parent.is_dir():
            raise ComaskError(f"--{option} {file}: its folder does not exist; make it first")


def write_json(target: str | None, content: Any) -> None:
    """Writes `content` where `--json` points; nothing without it.

    Raises:
        ComaskError: when the file cannot be written.
    """
    if target is None:
        return
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)  # JSON has no NaN
    text = json.dumps(finite, indent=2, ensure_ascii=False) + "\n"
    # a name that is not UTF-8 holds half characters, which JSON can escape
    text = text.encode(errors="backslashreplace").decode()
    if target == "-":
        click.echo(text, nl=False)
        return
    try:
        write_whole(Path(target), text.encode())
    except OSError as error:
        raise ComaskError(f"--json {target}: cannot be written: {error.strerror}") from error


def find_files(inputs: tuple[str, ...], suffixes: set[str]) -> list[Path]:
    """The files that inputs name: a file as it is, a folder's files, what a pattern matches.

    A folder gives the files that have one of `suffixes`, in order of name; a file or pattern gives
    whatever it names, since images and videos are known by their content.

    Raises:
        ComaskError: when an input names nothing.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
            if not files:
                kinds = "image" if suffixes <= IMAGE_SUFFIXES else "image or video"
                raise ComaskError(
                    f"{text}: no {kinds} lies directly in it; subfolders are not searched: "
                    f"'{path / '**/*.jpg'}'"
                )
        elif path.exists():
            files = [path]
        else:
            files = [p for p in map(Path, sorted(glob.glob(text, recursive=True))) if p.is_file()]
            if not files:
                raise ComaskError(f"{text}: no such file or folder, and no file matches it")
        found.update(dict.fromkeys(files))
    return list(found)
