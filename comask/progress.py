"""Shows the progress of a long job: a live bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_SECONDS = 15.0  # between two lines without a terminal
FIRST_STEPS = 5  # the remaining time is not estimated from fewer steps


class Progress:
    """A context manager that shows the progress of a job on standard error.

    Args:
        title: the job's name.
        total: the number of steps.
        unit: the name of the steps, in the plural.
        done: steps that are done already, as after a resume.
        quiet: show nothing, as for all but the first of several processes.

    Attributes:
        done: the number of steps so far.
    """

    def __init__(
        self, title: str, total: int, *, unit: str = "steps", done: int = 0, quiet: bool = False
    ) -> None:
        self._quiet = quiet
        self._title, self._total, self._unit = title, total, unit
        self.done = self._done_before = done
        self._start = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self._quiet:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.add_task(
                self._title, total=self._total, completed=self.done, rate="", note=""
            )
            self._bar.start()
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Adds `steps` and shows `note` after the bar."""
        self.done += steps
        if self._quiet:
            return
        now = time.monotonic()
        rate = (self.done - self._done_before) / max(now - self._start, 1e-9)
        timed = self._unit == "seconds"  # a rate of seconds per second would say nothing
        if self._bar:
            shown = "" if timed else f"{rate:.1f} {self._unit}/s"
            self._bar.update(self._bar.task_ids[0], completed=self.done, rate=shown, note=note)
        elif now - self._last_line >= LINE_SECONDS or self.done == self._total:
            self._last_line = now
            line = f"{self._title}: {self.done}/{self._total} {self._unit}"
            line += "" if timed else f", {rate:.1f}/s"
            if self.done == self._total:
                line += f", {duration(now - self._start)}"
            elif self.done - self._done_before >= FIRST_STEPS:
                line += f", {duration((self._total - self.done) / max(rate, 1e-9))} left"
            print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Formats a duration, such as `40 s`, `12 min` or `2 h 35 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
