"""Defines a row of the table: a check, its figure, and what became of it."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comask.errors import BackendUnavailableError, KernelUnavailableError

PASS, FAIL, UNAVAILABLE = "PASS", "FAIL", "unavailable"
RUNS = "nothing: it must run to its end"  # what a row without a reference is compared with


class UnavailableError(Exception):
    """A requirement of a row is missing on this machine; the text says why.

    Args:
        reason: the text.
        need: the requirement by the name that other rows have in `Check.needs`, which are then skipped.
    """

    def __init__(self, reason: str, need: str = "") -> None:
        super().__init__(reason)
        self.need = need


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measurement of a check.

    Attributes:
        value: the figure; 1.0 for "it works" if the check measures nothing.
        unit: the unit of the figure.
        least: the lower limit, or None.
        most: the upper limit, or None.
        note: further information in a few words.
    """

    value: float
    unit: str = ""
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def reached(self) -> bool:
        """Whether the value is within its limits; NaN never is."""
        above = self.least is None or self.value >= self.least
        below = self.most is None or self.value <= self.most
        return above and below and self.value == self.value


@dataclass(frozen=True, kw_only=True)
class Check:
    """A row to be run.

    Attributes:
        name: the row's name, unique among all groups.
        run: measures the figure; the argument is a `Context`.
        compared: the reference of the figure.
        fails: what makes the row fail.
        needs: names of requirements, from `needs.py` or from `provides` of an earlier row. If one of them
            is missing, the row is `unavailable` without being started.
        provides: what later rows need of this one: an artefact, or proof that something works at all.
        limit: seconds after which the row is killed and fails.
        isolated: whether the row has a process of its own.
    """

    name: str
    run: Callable[[Any], Figure]
    compared: str
    fails: str
    needs: tuple[str, ...] = ()
    provides: str = ""
    limit: float = 30.0
    isolated: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished check; `status` is PASS, FAIL or unavailable."""

    group: str
    name: str
    status: str
    value: float | None = None
    unit: str = ""
    least: float | None = None
    most: float | None = None
    note: str = ""
    seconds: float = 0.0
    compared: str = ""
    fails: str = ""

    @property
    def bar(self) -> str:
        """The limits as text, such as `>= 3` or `<= 1e-05`; empty without limits."""
        parts = [f">= {self.least:g}"] if self.least is not None else []
        parts += [f"<= {self.most:g}"] if self.most is not None else []
        return " and ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Returns all fields, including `least` and `most`."""
        return dataclasses.asdict(self)


def row_of(group: str, check: Check, status: str, note: str, seconds: float = 0.0) -> Row:
    """Returns a row without a figure."""
    return Row(
        group=group, name=check.name, status=status, note=one_line(note), seconds=round(seconds, 3),
        compared=check.compared, fails=check.fails,
    )  # fmt: skip


def run_check(group: str, check: Check, context: Any) -> tuple[Row, str]:
    """Runs one check; an exception becomes part of the row, so that the next check still runs.

    Returns:
        The row, and the name of the requirement that turned out to be missing, or an empty text.
    """
    start = time.perf_counter()
    try:
        figure = check.run(context)
    except Exception as error:  # a failing row is a result and must not end the table
        seconds = time.perf_counter() - start
        if _is_missing(error):
            return row_of(group, check, UNAVAILABLE, str(error), seconds), _need(error)
        place = traceback.extract_tb(error.__traceback__)[-1]
        note = f"{type(error).__name__}: {error} ({place.name}:{place.lineno})"
        traceback.print_exc()  # to the log of the group's process
        return row_of(group, check, FAIL, note, seconds), ""
    row = Row(
        group=group,
        name=check.name,
        status=PASS if figure.reached else FAIL,
        **dataclasses.asdict(figure),
        seconds=round(time.perf_counter() - start, 3),
        compared=check.compared,
        fails=check.fails,
    )
    return row, ""


def _is_missing(error: Exception) -> bool:
    """Returns whether a package, compiler or device is missing, and not merely failing."""
    if isinstance(error, ModuleNotFoundError):
        return not is_ours(error.name or "comask")
    return isinstance(error, UnavailableError | BackendUnavailableError | KernelUnavailableError)


def _need(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"module {(error.name or '').split('.')[0]}"
    return error.need if isinstance(error, UnavailableError) else ""


def is_ours(module: str) -> bool:
    """Returns whether a module belongs to comask; without it the checkout is broken."""
    return module.split(".")[0] == "comask"


def one_line(text: str) -> str:
    """Returns the text without line breaks, cut to the width of a table."""
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:397] + "..."
