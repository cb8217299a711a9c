"""Who does a job's shards: this process, or Ray; and the loop that sees to it that none is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from comask.errors import FleetError, one_line
from comask.runtime.fleet.job import Job
from comask.runtime.fleet.rows import Row
from comask.runtime.fleet.worker import Model, Worker

FAILURES_IN_A_ROW = 10  # of shards, before the fault is taken to lie elsewhere than in them


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
