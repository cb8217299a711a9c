"""Communication between training processes started by torchrun: gloo on CPUs, NCCL on GPUs.

In a single process, these functions only return the value that they are given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from comask.errors import TrainingError

T = TypeVar("T")
# Long enough for the other ranks to wait while the first one scores a large validation set.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the processes that train together.

    Attributes:
        rank: this process's number, from 0.
        world: the number of processes.
        device: this process's device.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files and prints messages."""
        return self.rank == 0


@contextmanager
def join() -> Iterator[Ranks]:
    """Joins the group that torchrun's environment variables describe; without them, trains alone.

    Raises:
        TrainingError: the machine has fewer GPUs than processes, or the variables are incomplete.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                f"give torchrun --nproc-per-node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(rank=0, world=1, device=device)
        return
    if "RANK" not in os.environ:
        raise TrainingError(
            f"WORLD_SIZE={world} is set, but RANK is not: start several processes by torchrun, or "
            f"unset WORLD_SIZE"
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield Ranks(rank=dist.get_rank(), world=world, device=device)
    # Not after an error: the other processes may never reach this point, and torchrun ends them when
    # this process ends.
    dist.destroy_process_group()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Returns the mean of `values` over all processes, without a gradient."""
    if not dist.is_initialized():
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def largest_over_ranks(value: int, ranks: Ranks) -> int:
    """Returns the largest value of all processes, on every process."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, device=ranks.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather(value: T) -> list[T]:
    """Returns every process's `value` by rank on the first process, and an empty list on the others."""
    if not dist.is_initialized():
        return [value]
    first = dist.get_rank() == 0
    values: list[T | None] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(value, values)
    return values or []  # type: ignore[return-value]  # None of them is None any more.


def share_from_first(value: T) -> T:
    """Returns the first process's `value` on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def leads_its_machine() -> bool:
    """Returns whether this process does the work that is needed once per machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def share_on_machine(value: T) -> T:
    """Returns the value of the process that leads this machine; waits for all processes."""
    if not dist.is_initialized():
        return value
    machine = os.environ.get("GROUP_RANK", "0")  # torchrun's number of the machine
    mine = machine, leads_its_machine(), value
    everybodys: list[tuple[str, bool, T] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, mine)
    (shared,) = [v for m, leads, v in everybodys if leads and m == machine]  # type: ignore[misc]
    return shared


def require_agreement(value: object) -> None:
    """Checks that all processes have the same `value`; otherwise they could wait for ever.

    Raises:
        TrainingError: this process's value differs from the first process's.
    """
    if share_from_first(value) != value:
        raise TrainingError(
            f"process {dist.get_rank()} sees other data or another checkpoint than the first one: "
            f"--data and --output must name the same folders on all machines"
        )
