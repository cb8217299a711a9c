"""Tables of the commands that measure."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from comask.runtime.bench.machine import MIB

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console(*, to_stderr: bool) -> Console:
    """Returns a console that is wide enough for the tables, also without a terminal."""
    from rich.console import Console

    return Console(
        stderr=to_stderr,
        width=None if sys.stdout.isatty() else 130,
        highlight=False,
        markup=False,  # names of files may look like it
        soft_wrap=True,
    )


def table(title: str, *heads: str) -> Table:
    """Returns an empty table. Columns under `backend` or under nothing hold text, the others numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for head in heads:
        text = head in ("", "backend")
        made.add_column(head, justify="left" if text else "right", no_wrap=True)
    return made


def number(value: float) -> str:
    """Formats with two decimals, or fewer where they would not fit a column."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def mib(size: int | None) -> str:
    """Formats bytes in MiB; `-` where the size is unknown."""
    return "-" if size is None else f"{size / MIB:.0f}"
