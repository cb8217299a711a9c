"""Formats the table on the terminal, one line per row."""

from __future__ import annotations

from rows import Row

WIDTHS = (12, 52, 12, 14)
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
