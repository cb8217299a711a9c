"""A row of the table: one thing that was checked, its figure, the bar it had to reach."""

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
    """What a row needs is not on this machine; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a check measured.

    Attributes:
        value: the figure; a check without one gives 1.0 for "it works".
        unit: of the figure.
        least: the bar from below; None where there is none.
        most: the bar from above.
        note: anything else worth knowing, in a few words.
    """

    value: float
    unit: str = ""
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def reached(self) -> bool:
        """Whether the bars are kept; a NaN keeps none."""
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
        """As text: `>= 3`, `<= 1e-05`, or nothing."""
        parts = [f">= {self.least:g}"] if self.least is not None else []
        parts += [f"<= {self.most:g}"] if self.most is not None else []
        return " and ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Every field, `least` and `most` included."""
        return dataclasses.asdict(self)


Check = Callable[[Any], Figure]


def run_check(group: str, name: str, check: Check, context: Any) -> Row:
    """Runs one check; whatever it raises becomes part of the row, so that the next one runs too."""
    start = time.perf_counter()
    try:
        figure = check(context)
    except Exception as error:  # a row that breaks is a finding, and not the end of the table
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
    """The row that a process printed as its last line of JSON, or how the process died."""
    if done.returncode == 0:
        printed = [text for text in done.stdout.splitlines() if text.startswith('{"group"')]
        return Row(**json.loads(printed[-1]))
    code = done.returncode
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    words = (done.stderr or done.stdout).strip().splitlines()[-1:]
    note = one_line(": ".join([f"its process died with {end}", *words]))
    return Row(group=group, name=name, status=FAIL, note=note)


def _is_missing(error: Exception) -> bool:
    """Whether a package, compiler or device is not there, as opposed to one that fails."""
    if isinstance(error, ModuleNotFoundError):
        return not is_ours(error.name or "comask")
    return isinstance(error, UnavailableError | BackendUnavailableError | KernelUnavailableError)


def is_ours(module: str) -> bool:
    """Whether a module is comask's: without it the checkout is broken."""
    return module.split(".")[0] == "comask"


def one_line(text: str) -> str:
    """The text without line breaks, cut where a table ends."""
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:397] + "..."
