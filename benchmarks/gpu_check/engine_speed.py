"""Measures the speed of a flavor's engines as ratios in one run, their memory, and threads."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from building import WORKS, build_engine, engine_bundle, engines_name
from clock import wall_seconds
from context import Context
from in_threads import in_threads
from network import AMP_TIME
from rows import Check, Figure

IMAGES_PER_SECOND = {1: 250.0, 8: 450.0}  # limits for an H200, by batch
LIMITS_ARE_FOR = "H200"
MEMORY_GIB = 6.0


def builds(context: Context, *, flavor: str, precision: str) -> Figure:
    """Builds engines of the bundle to time."""
    start = time.perf_counter()
    build_engine(context, engine_bundle(context, flavor, timed=True), flavor, precision)
    return Figure(value=time.perf_counter() - start, unit="s")


def against_amp(context: Context, *, flavor: str) -> Figure:
    """Compares the GPU's time for both stages with one pass of PyTorch AMP on the device."""
    with _stages(context, flavor, "fp16") as stages:
        engine = gpu_seconds(context, stages, 1)
    amp = context.recall(AMP_TIME.format(batch=1))
    note = f"{1e3 * engine:.2f} ms against {1e3 * amp:.2f} ms"
    least = None if context.rehearsal else 1.0
    return Figure(value=amp / engine, unit="times as fast", least=least, note=note)


def against_fp32(context: Context, *, flavor: str) -> Figure:
    """Compares the fp16 engines with the fp32 engines by the GPU's time."""
    times = []
    for precision in ("fp16", "fp32"):
        with _stages(context, flavor, precision) as stages:
            times.append(gpu_seconds(context, stages, 1))
    note = f"{1e3 * times[0]:.2f} ms against {1e3 * times[1]:.2f} ms"
    least = None if context.rehearsal else 1.5
    return Figure(value=times[1] / times[0], unit="times as fast", least=least, note=note)


def throughput(context: Context, *, flavor: str, batch: int) -> Figure:
    """Measures images per second, host to host; the limits are those of an H200."""
    count = context.sizes.batch if batch > 1 else 1
    with _stages(context, flavor, "fp16") as stages:
        feeds = context.images(count)
        took = wall_seconds(lambda: stages.run(**feeds), context.sizes.repeats)
    judged = not context.rehearsal and LIMITS_ARE_FOR in _gpu()
    return Figure(
        value=count / took, unit="images/s", least=IMAGES_PER_SECOND[batch] if judged else None,
        note=f"{1e3 * took:.2f} ms per batch of {count}",
    )  # fmt: skip


def memory(context: Context, *, flavor: str) -> Figure:
    """Measures the GPU memory of both stages at the larger batch by the driver's free memory."""
    from device import free_memory

    from comask.runtime.device import open_device

    with open_device():
        before = free_memory()
    with _stages(context, flavor, "fp16") as stages:
        stages.run(**context.images(context.sizes.batch))
        with open_device():
            taken = (before - free_memory()) / 2**30
    return Figure(value=taken, unit="GiB", most=MEMORY_GIB)


def threads(context: Context, *, flavor: str) -> Figure:
    """Compares the rate of two threads that call the engines with that of one."""
    rates, calls = [], max(4, context.sizes.repeats)
    with _stages(context, flavor, "fp16") as stages:
        feeds = context.images(1)
        for number in (2, 1, 2):  # the first warms up both contexts

            def work(_: int, count: int = calls // number) -> None:
                for _ in range(count):
                    stages.run(**feeds)

            start = time.perf_counter()
            errors = in_threads(number, work)
            rates.append(calls / (time.perf_counter() - start))
            if errors:
                raise errors[0]
    note = f"{rates[2]:.1f} against {rates[1]:.1f} images/s"
    least = None if context.rehearsal else 0.9
    return Figure(value=rates[2] / rates[1], unit="times as fast", least=least, note=note)


def gpu_seconds(context: Context, stages: Any, batch: int) -> float:
    """Returns the median seconds of both stages by the GPU's clock."""
    feeds, times = context.images(batch), []
    for place in range(context.sizes.repeats + 3):
        seconds: dict[str, float] = {}
        stages.run(**feeds, seconds=seconds)
        if place >= 3:
            times.append(sum(seconds.values()))
    return statistics.median(times)


def _stages(context: Context, flavor: str, precision: str) -> Any:
    from comask.bundle import Bundle
    from comask.runtime.backends import open_stages

    bundle = engine_bundle(context, flavor, timed=True)
    return open_stages(Bundle.open(bundle), f"{flavor}:{precision}")


def _gpu() -> str:
    from comask.runtime.gpu import find_gpu

    gpu = find_gpu()
    return gpu.name if gpu else ""


def speed_checks(flavor: str) -> list[Check]:
    """Returns the rows of a flavor."""
    works, packages = WORKS[flavor], ("opencv", "pycocotools", "click", "safetensors")
    half, full = (engines_name(flavor, p, timed="timed ") for p in ("fp16", "fp32"))

    def row(name: str, run: Any, compared: str, fails: str, *needs: str) -> Check:
        return Check(
            name=f"{flavor} {name}", run=partial(run, flavor=flavor), compared=compared, fails=fails,
            needs=(works, half, *needs), limit=60, isolated=True,
        )  # fmt: skip

    def build(precision: str, provides: str) -> Check:
        return Check(
            name=f"{flavor} {precision}, the bundle to time, builds", isolated=True, limit=240,
            run=partial(builds, flavor=flavor, precision=precision), compared="nothing: it must work",
            fails="it does not build within its limit", provides=provides,
            needs=(works, "timed bundle", *packages),
        )  # fmt: skip

    bar = "the bar for an H200; on another GPU, nothing"
    return [
        build("fp16", half),
        row("fp16 against PyTorch AMP on the device", against_amp,
            "one channels-last pass of PyTorch under f16 autocast, without copies",
            "TensorRT is slower than PyTorch", "PyTorch's time, batch 1"),
        *(
            row(f"images per second, batch {batch}", partial(throughput, batch=batch), bar,
                f"fewer than {least:g} images/s on an H200")
            for batch, least in IMAGES_PER_SECOND.items()
        ),
        row("memory, batch 8", memory, "the bar", f"more than {MEMORY_GIB:g} GiB"),
        row("calls from two threads", threads, "the rate of one thread",
            "locks of TensorRT or Python make two threads slower than one"),
        build("fp32", full),
        row("fp16 against its fp32", against_fp32, "the same network in fp32",
            "fp16 is not 1.5 times as fast", full),
    ]  # fmt: skip
