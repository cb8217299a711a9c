"""What every command is: its help, its log, and how it fails."""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import io
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, overload

import click

from comask import __version__
from comask.errors import ComaskError, is_out_of_memory, one_line

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
FIXES = {
    errno.EROFS: "; take a folder that can be written, and copy a bundle there",
    errno.EACCES: "; ask for the right to read or write there, or take another folder",
    errno.ENOSPC: "; free space, or take another disk",
}
IN_ASCII = {
    "…": "...", "–": "-", "—": "-", "→": "->", "×": "x", "·": "*", "±": "+-", "≤": "<=",  # noqa: RUF001
    "≥": ">=", "²": "^2", "°": " degrees", "“": '"', "”": '"', "‘": "'", "’": "'",  # noqa: RUF001
}  # fmt: skip
EXPORT_COMMANDS = ("export", "quantize", "build", "serve")
EXTRAS = {  # the extra that brings a package which a command may find missing
    **dict.fromkeys(("torch", "torchvision", "safetensors", "matplotlib"), "train"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
}


class Option(click.Option):
    """An option that the help shows below a heading.

    Args:
        group: the heading; options without one come first.
        aliases: names that the option had in an earlier version; they work, and the help hides them.
    """

    def __init__(
        self,
        declarations: list[str],
        *,
        group: str = "",
        aliases: tuple[str, ...] = (),
        **rest: Any,
    ) -> None:
        super().__init__([*declarations, *aliases], **rest)
        self.group, self.aliases = group, aliases

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What click adds to the help, without ranges: an error names them."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option and its help, without earlier names."""
        names, self.opts = self.opts, [name for name in self.opts if name not in self.aliases]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names


def option(*declarations: str, **settings: Any) -> Callable[[Any], Any]:
    """Like `click.option`, with the settings of `Option` besides."""
    return click.option(*declarations, cls=Option, **settings)


class Command(click.Command):
    """A command for any terminal, and for files of any name, with its options in named groups.

    Args:
        moved: options of an earlier version that became a command of their own, and that command.
    """

    def __init__(self, *arguments: Any, moved: Mapping[str, str], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._moved = moved

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Runs the command on any terminal."""
        replace_what_terminals_lack()
        return super().main(*arguments, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes `-clip.mp4` for a file where such a file exists, as a pattern of the shell gives it."""
        options = {name for parameter in self.params for name in parameter.opts}
        named = (
            f"./{arg}"
            if arg.startswith("-") and arg not in options and Path(arg).is_file()
            else arg
            for arg in args
        )
        args = list(named)
        self._warn_of_aliases(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if command := self._moved.get(error.option_name):
                raise click.UsageError(
                    f"{error.option_name} belongs to a command of its own: {command} (see its --help)",
                    ctx,
                ) from error
            raise

    def _warn_of_aliases(self, args: list[str]) -> None:
        renamed = {
            alias: parameter.opts[0]
            for parameter in self.params
            for alias in getattr(parameter, "aliases", ())
        }
        for name in {arg.partition("=")[0] for arg in args} & renamed.keys():
            click.echo(
                f"warning: {name} is called {renamed[name]} now; version 0.3 drops the old name",
                err=True,
            )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options below the headings of their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        # what every command has comes last in its group
        options = sorted(
            self.get_params(ctx), key=lambda option: option.name in ("verbose", "help")
        )
        for parameter in options:
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                groups.setdefault(getattr(parameter, "group", "") or "Options", []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


@overload
def command(function: Callable[..., None]) -> click.Command: ...


@overload
def command(*, moved: Mapping[str, str]) -> Callable[[Callable[..., None]], click.Command]: ...


def command(
    function: Callable[..., None] | None = None, *, moved: Mapping[str, str] | None = None
) -> click.Command | Callable[[Callable[..., None]], click.Command]:
    """A click command that turns a ComaskError into one line and exit code 1.

    With --verbose the traceback is printed instead. Wrong usage exits with 2, as click does.

    Args:
        function: the command's; its docstring is the help, its module's last name the command's name.
        moved: see `Command`.
    """
    if function is None:
        return lambda later: _command(later, moved or {})
    return _command(function, {})


def _command(function: Callable[..., None], moved: Mapping[str, str]) -> click.Command:
    @click.command(
        cls=Command,
        name=function.__module__.rsplit(".", 1)[-1],
        help=function.__doc__,
        context_settings=CONTEXT,
        moved=moved,
    )
    @click.version_option(__version__, prog_name="comask", hidden=True)
    @option("-v", "--verbose", is_flag=True, help="Print more, with tracebacks.")
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
    """What the user can do about an error, in one line; None for a bug of comask.

    Args:
        error: the error that ended a command.
        module: the command's module.
    """
    if isinstance(error, ComaskError):
        text = one_line(error)
        if text.startswith("short_side:"):  # as an argument of `Predictor.load` is called
            return text.replace("short_side", "--short-side", 1)
        return text
    if isinstance(error, OSError) and error.strerror is not None:  # a full disk, no right to write
        where = f"{error.filename}: " if error.filename else ""
        return one_line(where + error.strerror + FIXES.get(error.errno or 0, ""))
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        exports = module.rsplit(".", 1)[-1] in EXPORT_COMMANDS
        if package in EXTRAS:
            extra = "export" if exports else EXTRAS[package]
            return f"{package} is not installed: pip install 'comask[{extra}]'"
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return f"not enough memory: take less at once ({one_line(error)})"
    return None


def replace_what_terminals_lack() -> None:
    """Has characters that the terminal's encoding lacks written in ASCII or by their numbers."""
    codecs.register_error("comask", _in_other_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="comask")


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
