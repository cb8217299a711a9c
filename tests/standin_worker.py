"""Runs the stand-in TensorRT's graphs in a process of its own, so that a real driver can queue them.

A call is queued as copies of the inputs to page-locked memory, libc's `sem_post` and `sem_wait` as host
functions, and copies of the outputs. In between, a worker that shares the memory runs the graph. Nothing
on the host touches the GPU's memory, everything can be captured as a CUDA graph, and no Python code of
this process runs inside a stream: a driver that waits for the stream while it holds Python's lock (pycuda
frees memory so) would wait for ever.

    python standin_worker.py FILE_DESCRIPTOR    # the worker: jobs come as lines of JSON
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

SHARED = 2**33  # bytes of address space; pages take memory once they are written
REQUEST, ANSWER, ERROR, ARRAYS = 0, 64, 128, 512  # of a job's memory: two semaphores, text, arrays
JUNK = 0x5A  # what a call leaves in its scratch memory

libc = ctypes.CDLL(None)
# By tensor: offset, type, shape in memory, and the number of channels if they come last there.
Layout = dict[str, tuple[int, str, tuple[int, ...], int]]


def wanted(driver: Any) -> bool:
    """Whether graphs run here: with a real driver, and with that of standin_host.c, which is alike."""
    return hasattr(driver, "cuLaunchHostFunc")


class Worker:
    """The process, which ends with this one."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        file = os.memfd_create("standin-tensorrt")
        os.truncate(file, SHARED)
        self.memory = mmap.mmap(file, SHARED)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._used = 0
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(file)], stdin=subprocess.PIPE, pass_fds=[file], text=True
        )

    def reserve(self, size: int) -> int:
        """Page-locked memory; returns its offset."""
        with self._lock:
            offset, size = self._used, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            self._used += size
            assert self._used <= SHARED
        address = ctypes.c_void_p(self.start + offset)
        self.must("cuMemHostRegister_v2", address, ctypes.c_size_t(size), 0)
        return offset

    def give(self, job: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def must(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        assert status == 0, f"{name} failed with {status}"

    def call(self, stream: int, function: Any, address: int) -> None:
        """Queues a call of a C function of one pointer."""
        self.must(
            "cuLaunchHostFunc", ctypes.c_void_p(stream), ctypes.cast(function, ctypes.c_void_p),
            ctypes.c_void_p(address),
        )  # fmt: skip

    def copy(self, name: str, to: int, source: int, size: int, stream: int) -> None:
        self.must(
            name, ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size),
            ctypes.c_void_p(stream),
        )  # fmt: skip


worker: Worker | None = None
jobs: list[Job] = []
_starting = threading.Lock()  # a second worker would unmap the memory of the first one's jobs


class Job:
    """A graph for inputs of certain shapes. One call at a time; calls on one stream are."""

    def __init__(
        self, driver: Any, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any],
        scratch: int,
    ) -> None:  # fmt: skip
        """Inputs and outputs are (dtype, shape, shape in memory) by name; `scratch` is in bytes."""
        global worker
        with _starting:
            worker = worker or Worker(driver)
        self.scratch, end = scratch, ARRAYS
        self.layout: dict[str, Layout] = {}
        for kind, tensors in {"inputs": inputs, "outputs": outputs}.items():
            placed = self.layout[kind] = {}
            for name, (dtype, shape, stored) in tensors.items():
                channels = 0 if tuple(shape) == tuple(stored) else shape[1]
                placed[name] = end, np.dtype(dtype).str, tuple(stored), channels
                end += -(-_size(placed[name]) // 64) * 64
        self.junk = end
        self.offset = worker.reserve(end + scratch)
        self.address = worker.start + self.offset
        ctypes.memset(self.address, 0, end)  # the padding of channels as well
        ctypes.memset(self.address + self.junk, JUNK, scratch)
        for semaphore in (REQUEST, ANSWER):
            assert libc.sem_init(ctypes.c_void_p(self.address + semaphore), 1, 0) == 0
        worker.give({"graph": graph, "offset": self.offset, **self.layout})
        jobs.append(self)

    def queue(self, stream: int, addresses: Mapping[str, int], scratch: int | None) -> None:
        """Queues a call on a stream, which may be capturing."""
        assert worker is not None
        for name, (offset, *_) in self.layout["inputs"].items():
            size = _size(self.layout["inputs"][name])
            worker.copy(
                "cuMemcpyDtoHAsync_v2", self.address + offset, addresses[name], size, stream
            )
        if scratch is not None:  # whoever else lies there is lost
            worker.copy(
                "cuMemcpyHtoDAsync_v2", scratch, self.address + self.junk, self.scratch, stream
            )
        worker.call(stream, libc.sem_post, self.address + REQUEST)
        worker.call(stream, libc.sem_wait, self.address + ANSWER)
        for name, (offset, *_) in self.layout["outputs"].items():
            size = _size(self.layout["outputs"][name])
            worker.copy(
                "cuMemcpyHtoDAsync_v2", addresses[name], self.address + offset, size, stream
            )

    @property
    def error(self) -> str:
        """What went wrong in the worker."""
        return ctypes.string_at(self.address + ERROR).decode(errors="replace")


def errors() -> list[str]:
    """What went wrong in any job."""
    return [job.error for job in jobs if job.error]


def _size(placed: tuple[int, str, tuple[int, ...], int]) -> int:
    _, dtype, shape, _ = placed
    return math.prod(shape) * np.dtype(dtype).itemsize


# In the worker.


def work(start: int, session: Any, job: dict[str, Any]) -> None:
    """Runs a job whenever its semaphore says so."""
    address = start + job["offset"]
    arrays = {}
    for name, (offset, dtype, shape, channels) in {**job["inputs"], **job["outputs"]}.items():
        size = _size((offset, dtype, shape, channels))
        memory = (ctypes.c_char * size).from_address(address + offset)
        array = np.frombuffer(memory, dtype).reshape(shape)
        arrays[name] = np.moveaxis(array[..., :channels], -1, 1) if channels else array
    names = list(job["outputs"])
    while True:
        if libc.sem_wait(ctypes.c_void_p(address + REQUEST)):
            continue  # interrupted
        try:
            results = session.run(names, {name: arrays[name] for name in job["inputs"]})
            for name, result in zip(names, results, strict=True):
                arrays[name][...] = result
        except Exception as error:  # nobody here to raise it to
            text = repr(error).encode()[: ARRAYS - ERROR - 1]
            ctypes.memmove(address + ERROR, text, len(text))
            for name in names:
                arrays[name][...] = -1  # which nobody takes for a result
        libc.sem_post(ctypes.c_void_p(address + ANSWER))


def main() -> None:
    import onnxruntime

    memory = mmap.mmap(int(sys.argv[1]), SHARED)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions: dict[str, Any] = {}
    for line in sys.stdin:
        job = json.loads(line)
        graph = job["graph"]
        key = f"{graph} {os.stat(graph).st_mtime_ns}"
        if key not in sessions:
            sessions[key] = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        threading.Thread(target=work, args=(start, sessions[key], job), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()
