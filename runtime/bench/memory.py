"""Peak memory of a backend, measured in a fresh process that loads nothing else.

In the process that times several backends they would share one number. The fresh one loads the bundle
as a user's program does and runs a full batch twice: what it takes is what that program has to have.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comask.runtime.gpu import find_gpu

STATUS = Path("/proc/self/status")
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
    bundle: Path, backend: str, size: tuple[int, int], options: dict[str, Any]
) -> PeakMemory:
    """Memory that one backend takes; seconds, as it loads everything.

    Args:
        bundle: to run.
        backend: as `Predictor.load` takes it.
        size: (h, w) in pixels of the images, of which there are `max_batch`.
        options: of `Predictor.load`.
    """
    task = {"bundle": str(bundle), "backend": backend, "size": size, "options": options}
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
    import numpy as np

    from comask.runtime import Predictor
    from comask.runtime.bench.timing import CAPTURED, fill_slots
    from comask.runtime.stream import SLOTS

    task = json.loads(sys.argv[1])
    options = task["options"]
    index = options["device"]
    free = free_gpu_memory(index or 0) if index != "cpu" else None
    image = np.random.default_rng(0).integers(0, 256, (*task["size"], 3), dtype=np.uint8)

    def taken() -> int | None:
        # before anything is freed; backends keep what they once took
        return None if free is None else max(0, free - (free_gpu_memory(index or 0) or 0))

    with Predictor.load(task["bundle"], task["backend"], **options) as predictor:
        batch = [image] * predictor.max_batch
        for _ in range(RUNS):
            predictor(list(batch))
        found = {"resident": peak_resident(), "gpu": taken(), "stream": None}
        if predictor.stages.gpu is not None:
            with predictor.stream(slots=SLOTS) as session:
                fill_slots(session, batch, CAPTURED)
                found["stream"] = taken()
    print(json.dumps(found))


def peak_resident() -> int | None:
    """The most bytes that this process ever held; None where the system does not tell."""
    # Not getrusage's: on Linux a process inherits that from the one which started it.
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def free_gpu_memory(index: int) -> int | None:
    """Bytes of a GPU that nobody uses, with this process's CUDA context made; None without a GPU."""
    if find_gpu(index) is None:
        return None
    cuda: Any = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    status = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if status:
        return None
    cuda.cuCtxPushCurrent_v2(context)
    status = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    return None if status else free.value


if __name__ == "__main__":
    main()
