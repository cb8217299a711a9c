"""`--runner ray` on a Ray cluster of three nodes on this machine, of which some die."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from job_rows import rows_in
from PIL import Image

from comask.data.shapes import ShapesSource
from comask.runtime.jobs.folder import Folder

pytestmark = pytest.mark.slow

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'comask[jobs]'", allow_module_level=True)

COMMAND = [sys.executable, "-c", "from comask.cli.job import main; main()"]
# A process of its own, so that this one keeps nothing of Ray. It says where the cluster is and
# which process each node is, then ends the nodes whose numbers it is told; 0 is the head.
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
head = node | {"include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [cluster.head_node] + [cluster.add_node(**node) for _ in range(2)]
cluster.wait_for_nodes()
raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
print(json.dumps([cluster.address, raylets]), flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes[int(line)], allow_graceful=False)
    print("gone", flush=True)
cluster.shutdown()
"""
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # other programs may fill this machine
}
IMAGES = 30
STARTED = 120  # seconds that a cluster may take, on a busy machine
ENDED = 300  # that a command may take
NOTICED = 120  # that it may take to notice that there is no cluster any more


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up.

    Attributes:
        address: of its head.
        raylets: the process of each node, which begins those that work there.
        process: that has begun them.
    """

    address: str
    raylets: list[int]
    process: subprocess.Popen[str]

    def kill(self, node: int) -> None:
        """Ends all processes of a node by SIGKILL."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(node, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "gone\n"

    def workers(self) -> dict[int, set[int]]:
        """The processes that run images, of each node."""
        return {
            node: {
                pid
                for pid in descendants(raylet)
                if b"jobs.runners import serve" in command_line(pid)
            }
            for node, raylet in enumerate(self.raylets)
        }


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Three nodes of one CPU each."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment | QUIET,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    begun: set[int] = set()
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        address, raylets = json.loads(process.stdout.readline())
        begun |= set(descendants(process.pid))
        yield Cluster(address, raylets, process)
        begun |= set(descendants(process.pid))
        process.stdin.close()
        process.wait(STARTED)
    finally:
        begun |= set(descendants(process.pid))
        process.kill()
        process.wait()
        for pid in begun:
            if b"ray" in command_line(pid):  # still there; another one may have its number by now
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` began, and those that they did."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def command_line(pid: int) -> bytes:
    """That of a process; nothing where it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes images, and one file that is not an image."""
    folder = tmp_path_factory.mktemp("pictures")
    source = ShapesSource(num_images=IMAGES, seed=4)
    for index in range(IMAGES):
        Image.fromarray(source.image(index)).save(folder / f"{index:02}.png")
    (folder / "05.png").write_bytes(b"")
    return folder


@dataclass(frozen=True)
class Task:
    """A job of two images a part.

    Attributes:
        bundle: that is run.
        pictures: it is run on.
        output: where the job lies.
    """

    bundle: Path
    pictures: Path
    output: Path

    def start(self, runner: str, **environment: str) -> subprocess.Popen[str]:
        """Begins the command, or continues it."""
        return subprocess.Popen(
            [*COMMAND, self.bundle, self.pictures, "--output", self.output, "--runner", runner,
             "--shard", "2", "--format", "jsonl", "--json", "-"],
            env=os.environ | QUIET | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def done(self) -> int:
        """Parts that are recorded."""
        return len(list(self.output.glob("done/part-*.json")))

    def assert_finished(self, process: subprocess.Popen[str], like: Task) -> None:
        """The command ends, and has found what another job did, each image once."""
        output, errors = process.communicate(timeout=ENDED)
        assert process.returncode == 1, errors  # for the file that is not an image
        assert f"{IMAGES - 1} of {IMAGES} images, " in errors
        assert errors.count("skipped: ") == 1, errors
        assert "05.png: the file is empty" in errors
        assert "Traceback" not in errors
        rows = rows_in(Folder(str(self.output)))
        assert [row["file"] for row in rows] == sorted(map(str, self.pictures.iterdir()))
        assert rows == rows_in(Folder(str(like.output)))
        assert not list(self.output.glob("**/.*")), "something half-written is left"
        # last, so that whatever Ray says among it hides nothing of the above
        assert json.loads(output) == json.loads((self.output / "summary.json").read_text())


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Ends a command where the test has not."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    """Waits while a command runs; it may not have ended by then."""
    deadline = time.monotonic() + ENDED
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_end(pids: set[int]) -> None:
    """Processes end soon."""
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if b"jobs.runners import serve" in command_line(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def local(micro_bundle: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The job by `--runner local`."""
    task = Task(micro_bundle, pictures, tmp_path_factory.mktemp("local") / "job")
    with ending(task.start("local")) as process:
        task.assert_finished(process, task)
    rows = rows_in(Folder(str(task.output)))
    assert sum(len(row["detections"] or ()) for row in rows) > 0
    return task


@pytest.fixture
def task(local: Task, tmp_path: Path) -> Task:
    """The same, not begun."""
    return Task(local.bundle, local.pictures, tmp_path / "job")


def test_every_node_works_and_finds_what_the_local_runner_finds(local: Task, task: Task) -> None:
    with cluster() as three, ending(task.start("ray", RAY_ADDRESS=three.address)) as process:
        seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}

        def all_work() -> bool:
            for node, pids in three.workers().items():
                seen[node] |= pids
            return all(seen.values())

        wait_for(process, all_work)
        task.assert_finished(process, local)
        assert_end(set().union(*seen.values()))


def test_a_killed_command_leaves_the_cluster_to_the_next_one(local: Task, task: Task) -> None:
    with cluster() as three:
        with ending(task.start("ray", RAY_ADDRESS=three.address)) as process:
            wait_for(process, lambda: task.done >= 2)
            workers = set().union(*three.workers().values())
            assert workers
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert task.done < IMAGES // 2
        with ending(task.start("ray", RAY_ADDRESS=three.address)) as process:
            task.assert_finished(process, local)
        assert_end(workers)


def test_a_node_that_dies_leaves_its_work_to_the_others(local: Task, task: Task) -> None:
    with cluster() as three, ending(task.start("ray", RAY_ADDRESS=three.address)) as process:
        wait_for(process, lambda: task.done >= 2 and all(three.workers().values()))
        lost = three.workers()[2]
        three.kill(2)
        assert task.done < IMAGES // 2, "the job had ended before"
        assert_end(lost)
        task.assert_finished(process, local)


def test_without_its_head_the_command_says_so_and_goes_on_elsewhere(
    local: Task, task: Task
) -> None:
    with cluster() as three, ending(task.start("ray", RAY_ADDRESS=three.address)) as process:
        wait_for(process, lambda: task.done >= 2)
        three.kill(0)
        assert task.done < IMAGES // 2, "the job had ended before"
        output, errors = process.communicate(timeout=NOTICED)
    done = task.done
    with cluster() as three, ending(task.start("ray", RAY_ADDRESS=three.address)) as again:
        task.assert_finished(again, local)
    assert (process.returncode, output) == (1, ""), errors
    assert done < IMAGES // 2
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: "), errors
    assert "Ray" in errors.splitlines()[-1]
