"""Peak memory of a backend, measured in a fresh process that loads nothing else.

In the process that times several backends they would share one number. The fresh one loads the bundle
as a user's program does and runs a full batch twice: what it takes is what that program has to have.
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
from comask.runtime.bench.machine import peak_resident, used_gpu_memory
from comask.runtime.bench.timing import CAPTURED, fill_slots
from comask.runtime.predictor import Predictor
from comask.runtime.stream import SLOTS

RUNS = 2  # the second finds all buffers grown


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Of one process. None is what this machine cannot measure.

    Attributes:
        resident: bytes of the system's memory, with Python and all libraries, of calls one by one.
        gpu: bytes of the GPU's memory, without the CUDA context, of the same; 0 where it is not used.
        stream: bytes of the GPU's memory when the slots of a `Predictor.stream` are at work as well;
            None where the backend does not run them on a GPU.
        problem: why there are no numbers; empty where there are.
    """

    resident: int | None
    gpu: int | None
    stream: int | None
    problem: str = ""


def peak_memory(
    bundle: Path, backend: str, size: tuple[int, int], options: LoadOptions
) -> PeakMemory:
    """Memory that one backend takes. This takes seconds, as a process starts and loads everything.

    Args:
        bundle: to run.
        backend: as `Predictor.load` takes it.
        size: (h, w) in pixels of the images, of which there are `max_batch`.
        options: where and how it runs.
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
    """What the fresh process does."""
    task = json.loads(sys.argv[1])
    options = LoadOptions(**task["options"])
    index = None if options.device == "cpu" else options.device or 0
    before = None if index is None else used_gpu_memory(index)
    image = np.random.default_rng(0).integers(0, 256, (*task["size"], 3), dtype=np.uint8)

    def taken() -> int | None:
        # before anything is freed; backends keep what they once took
        if index is None or before is None:
            return None
        return max(0, (used_gpu_memory(index) or 0) - before)

    with Predictor.open(task["bundle"], task["backend"], options) as predictor:
        batch = [image] * predictor.max_batch
        for _ in range(RUNS):
            predictor(list(batch))
        found = {"resident": peak_resident(), "gpu": taken(), "stream": None}
        if predictor.stages.gpu is not None:
            with predictor.stream(slots=SLOTS) as session:
                fill_slots(session, batch, CAPTURED)
                found["stream"] = taken()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
