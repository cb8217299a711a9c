"""Defines a row of the table: a check, its figure, and the limit that the figure must keep."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comask.errors import BackendUnavailableError, KernelUnavailableError

PASS, FAIL, UNAVAILABLE = "PASS", "FAIL", "unavailable"


class UnavailableError(Exception):
    """A requirement of a row is missing on this machine; the text names it."""


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

    @property
    def bar(self) -> str:
        """The limits as text, such as `>= 3` or `<= 1e-05`; empty without limits."""
        parts = [f">= {self.least:g}"] if self.least is not None else []
        parts += [f"<= {self.most:g}"] if self.most is not None else []
        return " and ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Returns all fields, including `least` and `most`."""
        return dataclasses.asdict(self)


Check = Callable[[Any], Figure]


def run_check(group: str, name: str, check: Check, context: Any) -> Row:
    """Runs one check; an exception becomes part of the row, so that the next check still runs."""
    start = time.perf_counter()
    try:
        figure = check(context)
    except Exception as error:  # a failing row is a result and must not end the table
        if _is_missing(error):
            return Row(group=group, name=name, status=UNAVAILABLE, note=one_line(str(error)))
        place = traceback.extract_tb(error.__traceback__)[-1]
        note = f"{type(error).__name__}: {one_line(str(error))} ({place.name}:{place.lineno})"
        seconds = time.perf_counter() - start
        return Row(group=group, name=name, status=FAIL, note=note, seconds=round(seconds, 3))
    return Row(
        group=group,
        name=name,
        status=PASS if figure.reached else FAIL,
        value=figure.value,
        unit=figure.unit,
        least=figure.least,
        most=figure.most,
        note=figure.note,
        seconds=round(time.perf_counter() - start, 3),
    )


def finished_row(group: str, name: str, done: subprocess.CompletedProcess[str]) -> Row:
    """Returns the row that a process printed as JSON, or a row that says how the process died."""
    if done.returncode == 0:
        printed = [text for text in done.stdout.splitlines() if text.startswith('{"group"')]
        return Row(**json.loads(printed[-1]))
    code = done.returncode
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    words = (done.stderr or done.stdout).strip().splitlines()[-1:]
    note = one_line(": ".join([f"its process died with {end}", *words]))
    return Row(group=group, name=name, status=FAIL, note=note)


def _is_missing(error: Exception) -> bool:
    """Returns whether a package, compiler or device is missing, and not merely failing."""
    if isinstance(error, ModuleNotFoundError):
        return not is_ours(error.name or "comask")
    return isinstance(error, UnavailableError | BackendUnavailableError | KernelUnavailableError)


def is_ours(module: str) -> bool:
    """Returns whether a module belongs to comask; without it the checkout is broken."""
    return module.split(".")[0] == "comask"


def one_line(text: str) -> str:
    """Returns the text without line breaks, cut to the width of a table."""
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:397] + "..."
