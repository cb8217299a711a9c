"""Measures a backend's peak memory in a fresh process that loads nothing else.

In the process that times several backends they would share one number. The fresh process loads the bundle
as a user's program does and runs a full batch twice; such a program needs the memory that it takes.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comask.runtime.backends import LoadOptions
from comask.runtime.backends.names import gpu_index
from comask.runtime.bench.machine import peak_resident, used_gpu_memory
from comask.runtime.bench.timing import CAPTURED, fill_slots
from comask.runtime.predictor import Predictor
from comask.runtime.stream import SLOTS

RUNS = 2  # the second run finds all buffers at their full size


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The peak memory of one process. None stands for what this machine cannot measure.

    Attributes:
        resident: bytes of the system's memory for calls one by one, with Python and all libraries.
        gpu: bytes of the GPU's memory for the same calls, without the CUDA context; 0 if it is not used.
        stream: bytes of the GPU's memory while the slots of a `Predictor.stream` run as well; None if
            the backend does not run them on a GPU.
        problem: the reason why nothing could be measured; empty otherwise.
    """

    resident: int | None
    gpu: int | None
    stream: int | None
    problem: str = ""


def peak_memory(
    bundle: Path, backend: str, size: tuple[int, int], options: LoadOptions
) -> PeakMemory:
    """Measures one backend's memory, which takes seconds, since a process starts and loads everything.

    Args:
        bundle: the bundle to run.
        backend: a backend's name, see `Predictor.load`.
        size: (h, w) in pixels of the images, `max_batch` of which run together.
        options: the load options.
    """
    task = {
        "bundle": str(bundle), "backend": backend, "size": size,
        "options": dataclasses.asdict(options),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "comask.runtime.bench.memory", json.dumps(task)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return PeakMemory(None, None, None, last)
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Runs in the fresh process, and prints its memory as JSON."""
    task = json.loads(sys.argv[1])
    options = LoadOptions(**task["options"])
    index = gpu_index(options.device)
    before = None if index is None else used_gpu_memory(index)
    image = np.random.default_rng(0).integers(0, 256, (*task["size"], 3), dtype=np.uint8)

    def taken() -> int | None:
        # measured before anything is freed; backends keep memory that they once took
        if index is None or before is None:
            return None
        return max(0, (used_gpu_memory(index) or 0) - before)

    with Predictor.open(task["bundle"], task["backend"], options) as predictor:
        batch = [image] * predictor.max_batch
        for _ in range(RUNS):
            predictor(list(batch))
        memory = {"resident": peak_resident(), "gpu": taken(), "stream": None}
        if predictor.stages.gpu is not None:
            with predictor.stream(slots=SLOTS) as session:
                fill_slots(session, batch, CAPTURED)
                memory["stream"] = taken()
    print(json.dumps(memory))


if __name__ == "__main__":
    main()
