"""What runs shards: this process, a process of its own, or Ray; and the loop that leaves none undone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple, Protocol

from comask.errors import ComaskError, EngineError, FleetError, one_line
from comask.runtime.jobs.job import Job, Row, failed_row
from comask.runtime.jobs.worker import Model, Worker

ATTEMPTS = 3  # of an image alone; others may have taken the machine's memory meanwhile
LONGEST_LOAD = 1800  # seconds; what takes longer hangs
LONGEST_IMAGE = 60  # likewise, on the average of a shard
CHILD = "from comask.runtime.jobs.runners import serve; serve()"

FAILURES_IN_A_ROW = 10  # of shards, before the fault is taken to lie elsewhere than in them


class _DiedError(Exception):
    """The process that ran images is gone."""


class WorkerApart:
    """Runs images as `Worker` does, but survives them: those of a dead process are run by halves.

    Args:
        model: to run.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._child: _Child | None = None

    def __call__(self, addresses: list[str]) -> list[Row]:
        """A row for each image, in order; one at which the process dies each time has an `error`.

        Raises:
            ComaskError: when it is not the images that are to blame.
        """
        died = ""
        for _ in range(1 if len(addresses) > 1 else ATTEMPTS):
            child = self._child = self._child or self._begun()
            try:
                return child.ask(addresses, LONGEST_IMAGE * len(addresses))
            except _DiedError as error:
                self._child = None
                died = str(error)
        if len(addresses) == 1:
            text = f"{addresses[0]}: {ATTEMPTS} processes in a row died of it: {died}"
            return [failed_row(addresses[0], text)]
        half = len(addresses) // 2
        return self(addresses[:half]) + self(addresses[half:])

    def close(self) -> None:
        """Ends the process."""
        if self._child:
            self._child.close()
            self._child = None

    def _begun(self) -> _Child:
        """A process that has loaded the model and run an image that cannot be to blame."""
        child = _Child()
        try:
            child.ask(self._model, LONGEST_LOAD)
        except _DiedError as error:
            raise ComaskError(
                f"{self._model.bundle}: a process died while it loaded the bundle: {error}"
            ) from error
        except BaseException:
            child.close()
            raise
        return child


class _Child:
    """The other process and the pipe to it."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def ask(self, question: Model | list[str], longest: float) -> list[Row]:
        """Its answer, which it has `longest` seconds for.

        Raises:
            _DiedError: instead of answering, or ended since it did not.
            ComaskError: what it says instead.
        """
        try:
            self._connection.send(question)
            if not self._connection.poll(longest):
                self.close()
                raise _DiedError(f"no answer within {longest:.0f} s")
            rows, problem = self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise _DiedError(_ending(self._process.returncode)) from error
        if problem:
            raise ComaskError(problem)
        return list(rows)

    def close(self) -> None:
        """Ends it; how it had ended before remains known."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """The other process: a model comes by the pipe that the command line names, then lists of images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, which is for the parent
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    worker = None
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        rows: list[Row] = []
        problem = None
        try:
            if worker is None:
                worker = Worker(question.load())
                with contextlib.suppress(EngineError):  # said, not died of
                    worker.predictor.check()
            else:
                rows = worker(question)
        except Exception as error:
            problem = one_line(error)
        connection.send((rows, problem))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, {'out of memory?' if name == 'SIGKILL' else 'a fault in native code?'}"
    return f"exit code {code}"


class Shard(NamedTuple):
    """Some images of a job; see `Job.run`."""

    number: int
    start: int
    end: int


class Outcome(NamedTuple):
    """What became of a shard."""

    shard: int
    error: str  # empty where all is well


class Runner(Protocol):
    """Does shards."""

    def backend(self, model: Model) -> str:
        """The backend that `auto` is where the shards will be done."""

    def run(self, job: Job, model: Model, shards: list[Shard]) -> Iterator[Outcome]:
        """Does the shards, in any order; one that nothing is said of may or may not be done."""


class LocalRunner:
    """Does shards in this process, one after the other."""

    def backend(self, model: Model) -> str:
        """See `Runner`."""
        with model.load() as predictor:
            return predictor.stages.backend

    def run(self, job: Job, model: Model, shards: list[Shard]) -> Iterator[Outcome]:
        """See `Runner`."""
        with model.load() as predictor:
            worker = Worker(predictor)
            for shard in shards:
                yield Outcome(shard.number, attempt(job, shard, worker))


def attempt(job: Job, shard: Shard, worker: Callable[[list[str]], list[Row]]) -> str:
    """Does a shard; the error, empty where there is none."""
    try:
        job.run(*shard, worker)
    except Exception as error:  # the other shards are none the worse for it
        return one_line(error)
    return ""


def run_all(
    job: Job,
    model: Model,
    shards: Iterable[Shard],
    runner: Runner,
    done: Callable[[int], None],
) -> None:
    """Does the shards of a job, those that failed again, as long as that helps.

    Args:
        job: whose they are.
        model: to run.
        shards: to do.
        runner: that does them.
        done: is told the number of images of each shard that was done.

    Raises:
        FleetError: some cannot be done.
    """
    left = list(shards)
    while left:
        last, in_a_row = "", 0
        for number, error in runner.run(job, model, left):
            last, in_a_row = error or last, in_a_row + 1 if error else 0
            if in_a_row == FAILURES_IN_A_ROW:
                break
            if not error:
                done(job.images_in(number))
        there = {record.shard for record in job.done()}
        before, left = len(left), [shard for shard in left if shard.number not in there]
        if left and (len(left) == before or in_a_row == FAILURES_IN_A_ROW):
            raise FleetError(
                f"{len(left)} of {job.shards} parts cannot be written: "
                f"{last or 'their workers died'}; mend that, and run the same command again"
            )
