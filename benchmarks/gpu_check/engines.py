"""Checks a TensorRT flavor's engines: that they build, compute the network, keep AP, and stream."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import numpy as np
from building import WORKS, ap_difference, build_engine, engine_bundle, engines_name
from context import Context
from device import free_memory
from engine_speed import speed_checks
from network import compared
from onnxruntime_cuda import AP_POINTS
from rows import Check, Figure
from stand_in_session import ALIKE, PICTURES, SIZES, OwnFrame, distance, drawn, launches, on_host

KINDS = (("fp16", "python"), ("fp32", "python"), ("fp16", "aot"), ("fp16", "none"))
MIB = 2**20
LOST = 8.0  # MiB over all changes of shape, for what a driver keeps
CHANGES = 60


def builds(context: Context, *, flavor: str, precision: str, plugin: str) -> Figure:
    """Builds engines of the trained bundle; a contradiction in the inspector is a warning only."""
    start = time.perf_counter()
    info, printed = build_engine(
        context, engine_bundle(context, flavor, plugin), flavor, precision, plugin
    )
    warnings = [line for line in printed.splitlines() if "warning" in line.lower()]
    note = "; ".join([f"{info.version}, maps {info.map_format}", *warnings])
    return Figure(value=time.perf_counter() - start, unit="s", note=note)


def outputs(context: Context, *, flavor: str, precision: str, plugin: str) -> Figure:
    """Compares the stage outputs with PyTorch on the CPU."""
    from comask.bundle import Bundle
    from comask.runtime.backends import open_stages

    bundle = engine_bundle(context, flavor, plugin)
    stages = open_stages(Bundle.open(bundle), f"{flavor}:{precision}")
    return compared(context, stages, precision, shapes=True)


def ap(context: Context, *, flavor: str, precision: str) -> Figure:
    """Measures the larger difference of box and mask AP from PyTorch."""
    bundle = engine_bundle(context, flavor)
    worst, note = ap_difference(context, bundle, f"{flavor}:{precision}")
    most = None if context.rehearsal else AP_POINTS[precision]
    return Figure(value=worst, unit="AP points", most=most, note=note)


def streamed(context: Context, *, flavor: str) -> Figure:
    """Compares replayed CUDA graphs with eager execution, over three changes of shape."""
    pictures = [PICTURES[0]] * 4 + [drawn(SIZES[1], 5)] * 4 + [PICTURES[1]] * 4
    found = []
    with _load(context, flavor) as predictor:
        for graphs in (False, True):
            with launches() as launched, predictor.stream(slots=1, graphs=graphs) as session:
                found.append([session.submit(OwnFrame(image)).result() for image in pictures])
            if launched[0] != 9 * graphs:  # a failed capture only logs a warning
                raise RuntimeError(f"{launched[0]} of 12 frames were graphs, with graphs={graphs}")
    worst = max(map(distance, *found))
    return Figure(
        value=worst, unit="px or %", most=ALIKE, note=f"{sum(map(len, found[0]))} detections"
    )


def replay_time(context: Context, *, flavor: str) -> Figure:
    """Compares the time of replayed frames with that of eager ones, both after many frames."""
    seconds, count = [], context.sizes.frames
    with _load(context, flavor) as predictor:
        frame = OwnFrame(PICTURES[0])
        for graphs in (False, True):
            with predictor.stream(slots=1, graphs=graphs) as session:
                for _ in range(count):  # in which RTX specialises its kernels in the background
                    session.submit(frame).result()
                start = time.perf_counter()
                for _ in range(count):
                    session.submit(frame).result()
                seconds.append((time.perf_counter() - start) / count)
    note = f"{1e3 * seconds[1]:.2f} ms a frame, {1e3 * seconds[0]:.2f} ms eagerly"
    most = None if context.rehearsal else 1.1
    return Figure(value=seconds[1] / seconds[0], unit="of the eager time", most=most, note=note)


def masks(context: Context, *, flavor: str) -> Figure:
    """Compares the bitmaps and RLEs of a stream's masks from the GPU with those from the host."""
    from dataclasses import replace

    image = drawn((90, 120), 8)  # resized
    with _load(context, flavor) as predictor, predictor.stream(slots=1) as session:
        future = session.submit(OwnFrame(image), rle=True)
        bitmaps, found = on_host(future.bitmaps()), future.result()
    expected = np.zeros_like(bitmaps)
    expected[: len(found)] = found.masks
    strings = zip(found.to_rle(), replace(found).to_rle(), strict=True)
    wrong = int((bitmaps != expected).sum()) + sum(ours != theirs for ours, theirs in strings)
    return Figure(value=float(wrong), unit="pixels and strings", most=0, note=f"{len(found)} masks")


def lost_memory(context: Context, *, flavor: str, plugin: str) -> Figure:
    """Changes the shape of the images again and again; the GPU's free memory must not shrink."""
    from comask.runtime.trt.engine_folder import find_engines, leak_of

    changes = 4 if context.rehearsal else CHANGES
    with _load(context, flavor, plugin) as predictor, predictor.stream(slots=1) as session:
        device: Any = session.predictor.stages.pool.device  # type: ignore[attr-defined]
        for turn in range(changes + 2):
            for image in (PICTURES[0], drawn(SIZES[1], 5)):
                session.submit(OwnFrame(image)).result()
            gc.collect()
            with device:
                if turn == 1:  # all buffers have grown
                    before = free_memory()
                lost = (before - free_memory()) / MIB if turn else 0.0
    from comask.bundle import Bundle

    (folder,) = (
        engines
        for engines in find_engines(Bundle.open(engine_bundle(context, flavor, plugin)))
        if engines.info.precision == "fp16"
    )
    known = leak_of(folder.info)
    return Figure(value=lost, unit="MiB", most=None if known else LOST, note=known)


def scratch_told(context: Context, *, flavor: str) -> Figure:
    """Asks contexts how much scratch memory their shapes need; 0 would be replaced by the profile's."""
    with _load(context, flavor) as predictor:
        predictor.stages.run(PICTURES[0][None], np.array([SIZES[0]], np.int32))
        with predictor.stages.pool.contexts() as contexts:  # type: ignore[attr-defined]
            told = {
                stage: int(context.update_device_memory_size_for_shapes())
                for stage, context in contexts._contexts.items()
            }
            largest = {
                stage: contexts._engines[stage].largest_scratch(context.active_optimization_profile)
                for stage, context in contexts._contexts.items()
            }
    wrong = sum(told[stage] == 0 < largest[stage] for stage in told)
    note = ", ".join(
        f"{stage} {told[stage] / MIB:.1f} of {largest[stage] / MIB:.1f} MiB" for stage in told
    )
    return Figure(value=float(wrong), unit="stages that say 0", note=note)


def jit_cache(context: Context, *, flavor: str) -> Figure:
    """Compares the first call after loading without a JIT cache with one that finds it."""
    bundle, seconds = engine_bundle(context, flavor), []
    for file in bundle.rglob("*.jit.cache"):
        file.unlink()
    for _ in range(2):
        start = time.perf_counter()
        with _load(context, flavor) as predictor:
            predictor.stages.run(PICTURES[0][None], np.array([SIZES[0]], np.int32))
            seconds.append(time.perf_counter() - start)
    files = list(bundle.rglob("*.jit.cache"))
    if not files:
        raise RuntimeError("no cache was written")
    size = sum(file.stat().st_size for file in files)
    most = None if context.rehearsal else 0.8
    note = f"{seconds[0]:.1f} s, then {seconds[1]:.1f} s, {size / 1024:.0f} KiB"
    return Figure(value=seconds[1] / seconds[0], unit="of the first time", most=most, note=note)


def _load(context: Context, flavor: str, plugin: str = "python") -> Any:
    from comask.runtime import Predictor

    return Predictor.load(engine_bundle(context, flavor, plugin), f"{flavor}:fp16")


def checks(flavor: str) -> list[Check]:
    """Returns the rows of a flavor: engines with Python plugins first, others and speed after them."""
    works, scored = WORKS[flavor], ("opencv", "pycocotools", "click", "safetensors")
    half = engines_name(flavor, "fp16")

    def row(
        name: str, run: Any, compared: str, fails: str, *needs: str, limit: float = 60
    ) -> Check:
        return Check(
            name=f"{flavor} {name}", run=partial(run, flavor=flavor), compared=compared, fails=fails,
            needs=(works, *(needs or (half,))), limit=limit, isolated=True,
        )  # fmt: skip

    rows = []
    for precision, plugin in KINDS:
        name = engines_name(flavor, precision, plugin)
        graphs = ("fp16 graphs",) if precision == "fp16" else ()
        kind = {"flavor": flavor, "precision": precision, "plugin": plugin}
        rows += [
            Check(
                name=f"{flavor} {precision}, plugin {plugin}, builds", run=partial(builds, **kind),
                compared="nothing: it must work", provides=name, limit=180, isolated=True,
                fails="it does not build, or its own proof rejects it",
                needs=(works, "trained bundle", *graphs, *scored),
            ),
            Check(
                name=f"{flavor} {precision}, plugin {plugin}, equals PyTorch", limit=60, isolated=True,
                run=partial(outputs, **kind), needs=(works, name, *scored),
                compared="every output of PyTorch in fp32 on the CPU",
                fails=f"one differs beyond {precision}'s tolerance, from fp16 sums for example",
            ),
        ]  # fmt: skip
        if (precision, plugin) == KINDS[0]:
            rows += [
                row("streamed, graphs equal eager", streamed, "the same frames without graphs",
                    "a capture fails, or a replay computes something else"),
                row("streamed, time of a replay", replay_time, "the time of a frame without graphs",
                    "a graph holds slower kernels than those that are ready by then"),
                row("streamed, masks equal the host's", masks, "the host's masks of its detections",
                    "a pixel or a string differs"),
                row("scratch memory of shapes", scratch_told, "the profile's largest",
                    "it does not run; a 0 is seen here and costs memory only"),
                *([row("JIT cache", jit_cache, "the first load, without it",
                       "kernels are compiled again")] if flavor == "tensorrt-rtx" else []),
            ]  # fmt: skip
        if precision == "fp16" and plugin != "none":
            rows.append(
                Check(
                    name=f"{flavor} memory over changes of shape, plugin {plugin}", limit=60,
                    run=partial(lost_memory, flavor=flavor, plugin=plugin), isolated=True,
                    needs=(works, name), compared="the free memory once buffers have grown",
                    fails=f"more than {LOST:g} MiB are lost, where no leak is known",
                )
            )  # fmt: skip
        if plugin == "python":
            rows.append(
                row(f"{precision}, AP", partial(ap, precision=precision), "PyTorch's AP",
                    f"box or mask AP differs by more than {AP_POINTS[precision]:g} points",
                    name, *scored, "faster-coco-eval", limit=120)
            )  # fmt: skip
    return rows + speed_checks(flavor)
