"""`RayRunner`: runs a job's shards on the GPUs or CPUs of a Ray cluster with Ray Data."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from comask.errors import BackendUnavailableError, ComaskError, FleetError, one_line
from comask.runtime.backends.base import Closing
from comask.runtime.jobs.job import Job
from comask.runtime.jobs.runners import Outcome, Shard, WorkerApart, attempt
from comask.runtime.jobs.worker import Model

ADDRESS = "RAY_ADDRESS"  # a cluster's address; without it, a cluster is started here and ended
ROUND = 2000  # shards that Ray gets at once, since each one is an object in its store
# Ray must not report its usage, nor log what it raises anyway.
SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "ERROR",
}
LONGEST_SILENCE = 45  # seconds; after 60, Ray itself would end the driver
STORE_BYTES = 100 * 2**20  # small, since only outcomes pass through Ray, and no results


class RayRunner(Closing):
    """Runs shards on a Ray cluster: one actor per GPU, or per CPU if the cluster has no GPU.

    Each actor runs its images in a process of its own, see `WorkerApart`.

    Args:
        actors: the number of actors; None for as many as the cluster has room for.
        cpu: whether to use CPUs even if the cluster has GPUs.

    Raises:
        BackendUnavailableError: Ray is not installed.
        ComaskError: Ray does not start, or has no room.
    """

    def __init__(self, actors: int | None = None, *, cpu: bool = False) -> None:
        self._over = threading.Event()
        own = ADDRESS not in os.environ
        os.environ |= SILENT
        if own:
            # Ray's monitor would end a whole actor; the kernel ends only the process that is too large.
            os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        else:
            # Otherwise Ray would try to connect for a quarter of an hour.
            os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
        try:
            self._ray: Any = importlib.import_module("ray")
            self._data: Any = importlib.import_module("ray.data")
        except ImportError as error:
            raise BackendUnavailableError(
                f"--runner ray: Ray cannot be imported ({one_line(error)}): pip install 'comask[jobs]'"
            ) from error
        start: dict[str, Any] = {"address": os.environ.get(ADDRESS, "local")}
        if own:
            start |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        # Otherwise Ray prints messages about its nodes to stdout, even if `log_to_driver` is false.
        with contextlib.suppress(ImportError):
            private: Any = importlib.import_module("ray._private.worker")
            private._worker_logs_enabled = False
        on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray replaces the handler.
        try:
            self._ray.init(logging_level="ERROR", log_to_driver=False, **start)
        except Exception as error:
            raise ComaskError(f"Ray at {start['address']}: {one_line(error)}") from error
        signal.signal(signal.SIGTERM, on_sigterm)
        context = self._data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = -1  # Another round repeats the shards that Ray gives up on.
        room = self._ray.cluster_resources()
        gpus, cpus = int(room.get("GPU", 0)), int(room.get("CPU", 0))
        self._on_gpu = gpus > 0 and not cpu
        slots = gpus if self._on_gpu else cpus
        if not slots or (actors or 0) > slots:
            self.close()
            kind = "GPUs" if self._on_gpu else "CPUs"
            raise ComaskError(f"--actors {actors or 1}: the Ray cluster has {slots} {kind}")
        self._actors = actors or slots
        head = self._ray.get_runtime_context().gcs_address
        threading.Thread(target=_watch, args=[head, self._over], daemon=True).start()

    def close(self) -> None:
        """Leaves the cluster, or ends the one that was started here."""
        self._over.set()
        self._ray.shutdown()

    def backend(self, model: Model) -> str:
        """Returns the backend that `auto` selects on the cluster.

        Raises:
            ComaskError: no backend runs there.
        """
        remote = self._ray.remote(**self._needs)(_backend)
        with _told():
            name, problem = self._ray.get(remote.remote(self._placed(model)))
        if problem:
            raise ComaskError(problem)
        return str(name)

    def run(self, job: Job, model: Model, shards: list[Shard]) -> Iterator[Outcome]:
        """Runs the shards on the cluster, and yields their outcomes as they finish.

        Raises:
            FleetError: Ray gives up.
        """
        for start in range(0, len(shards), ROUND):
            rows = [shard._asdict() for shard in shards[start : start + ROUND]]
            with _told():
                data = self._data.from_items(rows, override_num_blocks=len(rows)).map(
                    _Actor,
                    fn_constructor_args=(job, self._placed(model)),
                    compute=self._data.ActorPoolStrategy(size=min(self._actors, len(rows))),
                    **self._needs,
                )
                for row in data.iter_rows():
                    yield Outcome(row["shard"], row["error"])

    @property
    def _needs(self) -> dict[str, int]:
        return {"num_gpus": 1} if self._on_gpu else {"num_cpus": 1}

    def _placed(self, model: Model) -> Model:
        """Returns the model for an actor's device; an actor sees only the GPU that Ray gives it."""
        return replace(
            model, options=replace(model.options, device=None if self._on_gpu else "cpu")
        )


class _Actor:
    def __init__(self, job: Job, model: Model) -> None:
        self._job, self._worker = job, WorkerApart(model)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = Shard(**row)
        return {"shard": shard.number, "error": attempt(self._job, shard, self._worker)}


def _watch(head: str, over: threading.Event) -> None:
    """Reports that the cluster is gone. Otherwise Ray would end this process silently in native code."""
    host, _, port = head.rpartition(":")
    heard = time.monotonic()
    while not over.wait(2):
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            heard = time.monotonic()
        except OSError:
            if time.monotonic() - heard > LONGEST_SILENCE:
                print(
                    f"error: the Ray cluster at {head} no longer answers: start it again, and run the "
                    f"same command again",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns every exception of Ray into one with a short text."""
    try:
        yield
    except Exception as error:
        raise FleetError(f"Ray: {one_line(error)[-300:]}; its logs are in /tmp/ray") from error


def _backend(model: Model) -> tuple[str, str]:
    """Returns the backend's name and "", or "" and the error."""
    try:
        with model.load() as predictor:
            return predictor.stages.backend, ""
    except Exception as error:
        return "", one_line(error)
