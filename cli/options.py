"""What the commands share: how they fail, find files and name data sets."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import errno
import functools
import io
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
from comask.files import write_whole
from comask.media_files import Kind, PassedOver, find_media

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
MENDS = {
    errno.EROFS: "; take a folder that can be written, and copy a bundle there",
    errno.EACCES: "; ask for the right to read or write there, or take another folder",
    errno.ENOSPC: "; free space, or take another disk",
}
IN_ASCII = {
    "…": "...", "–": "-", "—": "-", "→": "->", "×": "x", "·": "*", "±": "+-", "≤": "<=",  # noqa: RUF001
    "≥": ">=", "²": "^2", "°": " degrees", "“": '"', "”": '"', "‘": "'", "’": "'",  # noqa: RUF001
}  # fmt: skip
EXTRAS = {  # that brings a package which a command may find missing
    **dict.fromkeys(("torch", "torchvision", "safetensors", "matplotlib"), "train"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
}


def command(function: Callable[..., None]) -> click.Command:
    """A click command that turns a ComaskError into one line and exit code 1.

    With --verbose the traceback follows. Wrong usage exits with 2, as click does.
    """

    @click.command(
        cls=_Command,
        name=function.__module__.rsplit(".", 1)[-1],
        help=function.__doc__,
        context_settings=CONTEXT,
    )
    @click.option("-v", "--verbose", is_flag=True, help="Say more; show tracebacks.")
    @click.version_option(__version__, prog_name="comask")
    @functools.wraps(function)
    def run(*, verbose: bool, **arguments: Any) -> None:
        try:
            with _log_on_terminal(verbose), _ended_by_sigterm():
                function(**arguments)
        except Exception as error:
            text = _explained(error, function.__module__)
            if verbose or text is None:
                raise
            click.echo(f"error: {text}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except _TerminatedError as error:
            click.echo("terminated", err=True)
            sys.exit(error.code)

    return run


def _explained(error: Exception, module: str) -> str | None:
    """What its reader can do about an error, in one line; None of one that is our own mistake.

    Args:
        error: that ended a command.
        module: of the command.
    """
    if isinstance(error, ComaskError):
        text = one_line(error)
        if text.startswith("short_side:"):  # as an argument of `Predictor.load` is called
            return text.replace("short_side", "--short-side", 1)
        return text
    if isinstance(error, OSError) and error.strerror is not None:  # a full disk, no right to write
        where = f"{error.filename}: " if error.filename else ""
        return one_line(where + error.strerror + MENDS.get(error.errno or 0, ""))
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = "export" if module == "comask.cli.export" else EXTRAS.get(package)
        if package in EXTRAS:
            return f"{package} is not installed: pip install 'comask[{extra}]'"
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return f"not enough memory: take less at once ({one_line(error)})"
    return None


class _Command(click.Command):
    """A command for any terminal, and for files of any name."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Runs the command; what the terminal's encoding lacks is written in other characters."""
        codecs.register_error("comask", _in_other_characters)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="comask")
        return super().main(*arguments, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes `-clip.mp4` for a file where there is one, as a pattern of the shell gives it."""
        options = {name for parameter in self.params for name in parameter.opts}
        named = (
            f"./{arg}"
            if arg.startswith("-") and arg not in options and Path(arg).is_file()
            else arg
            for arg in args
        )
        return super().parse_args(ctx, list(named))


def _in_other_characters(error: UnicodeError) -> tuple[str, int]:
    """Handles an encoding error: the typographic characters of our texts in ASCII, others by number."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    plain = (IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(plain), error.end


@contextlib.contextmanager
def _log_on_terminal(verbose: bool) -> Iterator[None]:
    """Shows warnings, and with `verbose` more, while the command runs."""
    root, handler = logging.getLogger(), logging.StreamHandler()  # to stderr
    level, wanted = root.level, logging.INFO if verbose else logging.WARNING
    handler.setLevel(wanted)
    root.addHandler(handler)
    root.setLevel(min(level, wanted))  # other handlers keep what they get
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


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


def gathered(name: str, kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes one argument of several options.

    Args:
        name: of the argument.
        kind: a dataclass whose fields are called as the options' parameters; the default of a field
            stands for an option that was not given.
    """
    fields = [field.name for field in dataclasses.fields(kind)]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            taken = {field: arguments.pop(field) for field in fields}
            given = {field: value for field, value in taken.items() if value is not None}
            function(**arguments, **{name: kind(**given)})

        return run

    return decorate


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
    ascii_only = target == "-" and (sys.stdout.encoding or "ascii").lower() != "utf-8"
    text = json.dumps(finite, indent=2, ensure_ascii=ascii_only) + "\n"
    # a name that is not UTF-8 holds half characters, which JSON can escape
    text = text.encode(errors="backslashreplace").decode()
    if target == "-":
        click.echo(text, nl=False)
        return
    try:
        write_whole(Path(target), text.encode())
    except OSError as error:
        raise ComaskError(f"--json {target}: cannot be written: {error.strerror}") from error


def find_files(text: str, *kinds: Kind) -> list[Path]:
    """The files that one input names, see `find_media`; says which are passed over.

    Args:
        text: a file, a folder or a pattern.
        kinds: of the files that a folder gives: `image`, `video`.

    Raises:
        ComaskError: when it names nothing.
    """
    passed_over = PassedOver()
    try:
        return find_media(text, frozenset(kinds), passed_over)
    finally:
        for line in passed_over.lines(text):
            click.echo(line, err=True)


class Interruption:
    """Turns SIGINT and SIGTERM into a request to stop; the second one ends the process as usual.

    Attributes:
        signal: the number of the one that came, 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextlib.contextmanager
    def on_signal(self, stop: Callable[[], None] | None = None) -> Iterator[None]:
        """In this block, a signal sets `signal`, and calls `stop`."""
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def received(number: int, frame: FrameType | None) -> None:
            self.signal = number
            restore()
            if stop is not None:
                stop()

        for number in before:
            signal.signal(number, received)
        try:
            yield
        finally:
            restore()
