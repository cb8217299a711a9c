"""Runs the shards of a job until all are done: in this process, or in others that may die."""

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

ATTEMPTS = 3  # processes for an image alone, since other programs may have used up the memory
LONGEST_LOAD = 1800  # seconds; a process that takes longer counts as hanging
LONGEST_IMAGE = 60  # seconds per image, on average over a shard; likewise
CHILD = "from comask.runtime.jobs.runners import serve; serve()"

FAILURES_IN_A_ROW = 10  # consecutive failed shards after which the cause must lie elsewhere


class _DiedError(Exception):
    """The process that runs the images has ended."""


class WorkerApart:
    """Runs images like `Worker`, but in a process of its own; if it dies, runs its images by halves.

    Args:
        model: the model to run.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._child: _Child | None = None

    def __call__(self, addresses: list[str]) -> list[Row]:
        """Returns a row for each image, in order; one that kills its process each time gets an `error`.

        Raises:
            ComaskError: the images are not to blame.
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
            text = f"{addresses[0]}: {ATTEMPTS} processes in a row died while they ran it: {died}"
            return [failed_row(addresses[0], text)]
        half = len(addresses) // 2
        return self(addresses[:half]) + self(addresses[half:])

    def close(self) -> None:
        """Ends the process."""
        if self._child:
            self._child.close()
            self._child = None

    def _begun(self) -> _Child:
        """Returns a new process that has loaded the model and run a test image."""
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
    """The other process, with a pipe to it."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def ask(self, question: Model | list[str], longest: float) -> list[Row]:
        """Sends a question and returns the answer, waiting for it at most `longest` seconds.

        Raises:
            _DiedError: the process died, or was ended because it did not answer in time.
            ComaskError: the process answered with an error.
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
        """Ends the process. If it has already ended, its exit code is kept."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """Runs in the other process: receives a model through the pipe of `sys.argv`, then lists of images.

    It answers each message with rows and an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the parent.
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
                # The images will report such an error; here only the process's death matters.
                with contextlib.suppress(EngineError):
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
    """A shard of a job, see `Job.run`."""

    number: int
    start: int
    end: int


class Outcome(NamedTuple):
    """The outcome of a shard."""

    shard: int
    error: str  # empty if the shard is done


class Runner(Protocol):
    """Runs shards."""

    def backend(self, model: Model) -> str:
        """Returns the backend that `auto` selects on the machines that will run the shards."""

    def run(self, job: Job, model: Model, shards: list[Shard]) -> Iterator[Outcome]:
        """Runs the shards in any order; a shard without an outcome may or may not be done."""


class LocalRunner:
    """Runs shards in this process, one after the other."""

    def backend(self, model: Model) -> str:
        """Returns the backend that `auto` selects on this machine."""
        with model.load() as predictor:
            return predictor.stages.backend

    def run(self, job: Job, model: Model, shards: list[Shard]) -> Iterator[Outcome]:
        """Runs the shards in order, and yields the outcome of each."""
        with model.load() as predictor:
            worker = Worker(predictor)
            for shard in shards:
                yield Outcome(shard.number, attempt(job, shard, worker))


def attempt(job: Job, shard: Shard, worker: Callable[[list[str]], list[Row]]) -> str:
    """Runs a shard; returns its error, which is empty on success."""
    try:
        job.run(*shard, worker)
    except Exception as error:  # It does not affect the other shards.
        return one_line(error)
    return ""


def run_all(
    job: Job,
    model: Model,
    shards: Iterable[Shard],
    runner: Runner,
    done: Callable[[int], None],
) -> None:
    """Runs the shards of a job, and repeats failed ones as long as others succeed.

    Args:
        job: the job.
        model: the model to run.
        shards: the shards to run.
        runner: the runner that runs them.
        done: called with the number of images of each finished shard.

    Raises:
        FleetError: some shards cannot be done.
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
                f"{last or 'their workers died'}; fix that, and run the same command again"
            )
