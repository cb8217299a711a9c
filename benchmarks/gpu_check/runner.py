"""Runs each group of rows in a process, within their limits, and remembers what is missing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from needs import PACKAGES, why_missing
from rows import FAIL, PASS, UNAVAILABLE, Check, Row, row_of

START_LIMIT = 180.0  # seconds in which a process must have imported its packages, torch above all
END_LIMIT = 30.0  # seconds in which a process must end
REHEARSAL_SLOWER = 6.0  # factor of the limits on a CPU
OR = " or "  # between requirements of which one is enough


class ProcessError(Exception):
    """The process of a group ended or was killed; the text says how."""


class GroupProcess:
    """A process that runs rows one after the other, each when it is asked to.

    Args:
        command: the command; it is given the number of a pipe's end as its last argument, to which it
            writes one JSON object per line: first `{"ready": true}`, then one for each row whose name it
            reads from standard input.
        environment: the environment of the process.
        log: the file for all other output.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log, self._log_start = log, log.stat().st_size if log.exists() else 0
        reading, writing = os.pipe()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*command, str(writing)], stdin=subprocess.PIPE, stdout=file, stderr=file,
                pass_fds=[writing], env=dict(environment), start_new_session=True,
            )  # fmt: skip
        os.close(writing)
        self._pipe: int | None = reading
        self._text = b""

    def start(self) -> None:
        """Waits until the process can run rows; raises `ProcessError` if it cannot."""
        self._read(START_LIMIT, "to start")

    def ask(self, name: str, limit: float) -> dict[str, object]:
        """Runs one row; raises `ProcessError` if the process ends or the limit is exceeded."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(name.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ProcessError(self._death()) from None
        return self._read(limit, "for a row")

    def _read(self, limit: float, purpose: str) -> dict[str, object]:
        end = time.monotonic() + limit
        assert self._pipe is not None
        while b"\n" not in self._text:
            there, _, _ = select.select([self._pipe], [], [], max(0.0, end - time.monotonic()))
            if not there:
                self.kill()
                raise ProcessError(f"killed: it took more than {limit:g} s {purpose}")
            read = os.read(self._pipe, 2**16)
            if not read:
                raise ProcessError(self._death())
            self._text += read
        line, _, self._text = self._text.partition(b"\n")
        answer: dict[str, object] = json.loads(line)
        return answer

    def _death(self) -> str:
        """Waits for a process that closed its pipe, and says how it ended; empty if in order."""
        try:
            code = self._process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            return f"its process did not end within {END_LIMIT:g} s"
        finally:
            self.kill()
        if code == 0:
            return ""
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            words = file.read().decode(errors="replace").strip().splitlines()[-1:]
        return ": ".join([f"its process died with {end}", *words])

    def end(self) -> str:
        """Ends the process in order; returns how it died if it did not end so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        return self._death()

    def kill(self) -> None:
        """Kills the process, if it still runs, and its children."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


class Runner:
    """Runs groups of rows.

    Args:
        launch: starts the process of a group.
        report: called with each row as soon as it is known.
        rehearsal: whether stand-ins take the place of a GPU.
        seconds: seconds after which no further row is started; None for no limit.

    Attributes:
        missing: the reasons by requirement, as far as they are known.
    """

    def __init__(
        self,
        launch: Callable[[str], GroupProcess],
        report: Callable[[Row], None],
        *,
        rehearsal: bool = False,
        seconds: float | None = None,
    ) -> None:
        self._launch, self._report, self._rehearsal = launch, report, rehearsal
        self._end = None if seconds is None else time.monotonic() + seconds
        self._there: set[str] = set()
        self.missing: dict[str, str] = {}

    def run(self, group: str, checks: Sequence[Check]) -> None:
        """Runs the rows of a group; a process that dies costs the row that it ran."""
        process: GroupProcess | None = None
        last: Check | None = None  # that this process ran
        try:
            for check in checks:
                why = self._why_not(check)
                if why:
                    self._tell(check, row_of(group, check, UNAVAILABLE, why))
                    continue
                if process is not None and last is not None and self._apart(check, last):
                    self._end_process(group, process, last)
                    process = None
                started = time.perf_counter()
                try:
                    if process is None:
                        process = self._launch(group)
                        process.start()
                    answer = process.ask(check.name, self._limit(check))
                except ProcessError as error:
                    process = None
                    seconds = time.perf_counter() - started
                    why = str(error) or "its process ended without a result"
                    self._tell(check, row_of(group, check, FAIL, why, seconds))
                    continue
                self._tell(check, Row(**answer["row"]), str(answer["need"]))  # type: ignore[arg-type]
                last = check
            if process is not None and last is not None:
                self._end_process(group, process, last)
                process = None
        finally:
            if process is not None:
                process.kill()

    def _apart(self, check: Check, last: Check) -> bool:
        """Returns whether a row needs another process than the last one; in a rehearsal, none does."""
        return not self._rehearsal and (check.isolated or last.isolated)

    def _end_process(self, group: str, process: GroupProcess, last: Check) -> None:
        """Ends a process; one that dies at its end spoils its last row, which is reported again."""
        death = process.end()
        if death:
            self._tell(last, row_of(group, last, FAIL, f"{death}, after this row"))

    def _limit(self, check: Check) -> float:
        limit = check.limit * (REHEARSAL_SLOWER if self._rehearsal else 1)
        return limit if self._end is None else max(1.0, min(limit, self._end - time.monotonic()))

    def _why_not(self, check: Check) -> str:
        for need in check.needs:
            reasons = [self._missing(name) for name in need.split(OR)]
            if all(reasons):
                return "; ".join(reasons)
        if self._end is not None and time.monotonic() > self._end:
            return "the time that --minutes gives is over"
        return ""

    def _missing(self, need: str) -> str:
        """Returns why a requirement is missing, or an empty text; a machine is asked once."""
        if need not in self._there and need not in self.missing:
            try:
                why = why_missing(need, rehearsal=self._rehearsal)
            except KeyError:
                why = f"no row provided: {need}"
            if why:
                self.missing[need] = why
            else:
                self._there.add(need)
        return self.missing.get(need, "")

    def _learn(self, check: Check, row: Row, need: str) -> None:
        for name in (
            need,
            *(n for n, (module, _) in PACKAGES.items() if need == f"module {module}"),
        ):
            if name:
                self._there.discard(name)
                self.missing[name] = row.note
        if check.provides and row.status == PASS:
            self._there.add(check.provides)
        elif check.provides:
            self._there.discard(check.provides)
            words = "failed" if row.status == FAIL else "is unavailable"
            why = row.note or f"its figure is {row.value} {row.unit}"
            # of a chain, only the first row is told
            root = why if why.startswith("the row “") else f"the row “{check.name}” {words}: {why}"
            self.missing[check.provides] = root

    def _tell(self, check: Check, row: Row, need: str = "") -> None:
        self._learn(check, row, need)
        self._report(row)


def with_providers(groups: Mapping[str, Sequence[Check]], wanted: set[str]) -> set[str]:
    """Returns the names of rows to run: the wanted ones, and those that provide what they need.

    Raises:
        ValueError: if a row needs what neither `needs.py` knows nor an earlier row provides.
    """
    every = list(itertools.chain(*groups.values()))
    providers = {check.provides: place for place, check in enumerate(every) if check.provides}
    names = set(wanted)
    for place in reversed(range(len(every))):
        if every[place].name not in names:
            continue
        for need in itertools.chain(*(needs.split(OR) for needs in every[place].needs)):
            if need in providers:
                if providers[need] >= place:
                    raise ValueError(f"{every[place].name}: {need} is provided only later")
                names.add(every[providers[need]].name)
    return names


def write_answer(file: IO[str], row: Row, need: str) -> None:
    """Writes a row as `GroupProcess.ask` reads it."""
    file.write(json.dumps({"row": row.as_json(), "need": need}) + "\n")
    file.flush()
