"""Writes the table: one line per row on the terminal, and a file that is complete after every row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rows import FAIL, PASS, Check, Row

WIDTHS = (12, 56, 12, 14)
HEAD = "".join(
    text.ljust(width)
    for text, width in zip(("status", "check", "figure", "limit"), WIDTHS, strict=True)
) + "note"  # fmt: skip


def line(row: Row) -> str:
    """Returns a row as one line of text."""
    value = "" if row.value is None else f"{row.value:.3g}"
    note = "; ".join(part for part in (row.unit, row.note) if part)
    cells = (row.status, row.name, value, row.bar)
    padded = "".join(cell.ljust(width - 1) + " " for cell, width in zip(cells, WIDTHS, strict=True))
    return (padded + note).rstrip()


def described(check: Check) -> str:
    """Returns what `--list` prints of a row."""
    needs = f"; needs {', '.join(check.needs)}" if check.needs else ""
    return (
        f"  {check.name}  [at most {check.limit:g} s{needs}]\n"
        f"    compared with {check.compared}\n    fails if {check.fails}"
    )


class Table:
    """The rows so far, printed and written as they come.

    Args:
        path: the file, or None.
        head: what the file says about the run, besides its rows.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path, self._head = path, head
        self.rows: list[Row] = []
        self.seconds: dict[str, float] = {}  # that each group took
        self._write(complete=False)

    def add(self, row: Row) -> None:
        """Prints a row and writes the file anew; a row of the same name is replaced."""
        self.rows = [other for other in self.rows if other.name != row.name] + [row]
        print(line(row), flush=True)
        self._write(complete=False)

    def finish(self) -> None:
        """Marks the file as complete."""
        self._write(complete=True)

    def _write(self, *, complete: bool) -> None:
        if self._path is None:
            return
        seconds = {name: round(value, 1) for name, value in self.seconds.items()}
        content = self._head | {
            "complete": complete, "group_seconds": seconds,
            "rows": [row.as_json() for row in self.rows],
        }  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # whenever the run is killed, a whole file is there
        unfinished = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self._path)

    def summary(self) -> str:
        """Returns the numbers of rows and the seconds of each group."""
        count = {status: sum(row.status == status for row in self.rows) for status in (PASS, FAIL)}
        left = len(self.rows) - sum(count.values())
        groups = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        return (
            f"{count[PASS]} passed, {count[FAIL]} failed, {left} unavailable, in "
            f"{sum(self.seconds.values()):.0f} s ({groups})"
        )

    @property
    def failed(self) -> bool:
        """Whether any row failed."""
        return any(row.status == FAIL for row in self.rows)
