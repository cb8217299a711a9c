"""Measures the speed of the whole model, as ratios in one run, and its memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from backends import FLAVORS, build_engine, open_onnxruntime
from clock import wall_seconds
from context import Context
from rows import Figure

if TYPE_CHECKING:
    from comask.structures import Detections

IMAGES_PER_SECOND = {1: 250.0, 8: 450.0}  # limits for an H200, by batch
LIMITS_ARE_FOR = "H200"
MEMORY_GIB = 6.0
STREAMED = 32  # frames


def against_amp(context: Context, flavor: str) -> Figure:
    """Compares the fp16 engine with PyTorch under float16 autocast, from host images to results."""
    engine = _engine_seconds(context, flavor, "fp16", 1)
    amp = _torch_seconds(context, 1)
    note = f"{1e3 * engine:.2f} ms against {1e3 * amp:.2f} ms"
    return Figure(value=amp / engine, unit="times as fast", least=3.0, note=note)


def against_fp32(context: Context, flavor: str) -> Figure:
    """Compares the fp16 engine with the fp32 engine."""
    half = _engine_seconds(context, flavor, "fp16", 1)
    full = _engine_seconds(context, flavor, "fp32", 1)
    note = f"{1e3 * half:.2f} ms against {1e3 * full:.2f} ms"
    return Figure(value=full / half, unit="times as fast", least=2.0, note=note)


def throughput(context: Context, backend: str, batch: int) -> Figure:
    """Measures images per second, host to host; the limits are those of an H200."""
    if backend == "torch":
        context.need_gpu()
        seconds = _torch_seconds(context, batch)
    elif backend == "onnxruntime":
        seconds = _onnxruntime_seconds(context, batch)
    else:
        seconds = _engine_seconds(context, backend, "fp16", batch)
    import torch

    judged = backend in FLAVORS and LIMITS_ARE_FOR in torch.cuda.get_device_name(0)
    return Figure(
        value=batch / seconds,
        unit="images/s",
        least=IMAGES_PER_SECOND[batch] if judged else None,
        note=f"{1e3 * seconds:.2f} ms per batch of {batch}",
    )


def engine_memory(context: Context, flavor: str) -> Figure:
    """Measures the GPU memory of both stages at batch 8 from the driver's free memory."""
    context.need_gpu()
    import torch

    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    stages, feeds = _engine(context, flavor, "fp16", 8)
    with stages:
        stages.run(feeds["images"], feeds["image_sizes"])
        taken = (before - torch.cuda.mem_get_info()[0]) / 2**30
    return Figure(value=taken, unit="GiB", most=MEMORY_GIB)


def captured_graph(context: Context) -> Figure:
    """Replays both custom operators in a CUDA graph on other data and compares with eager calls."""
    context.need_gpu()
    import torch
    from kernels import CANONICAL, need_kernels, noise_pyramid

    from comask.models.nms import sorted_nms
    from comask.models.roi_align import pyramid_roi_align

    need_kernels(context)
    maps, rois = noise_pyramid(context, half=True, channels_last=True)
    groups = torch.zeros(rois.shape[:2], dtype=torch.int32, device="cuda")

    def both() -> tuple[Any, Any]:
        pooled = pyramid_roi_align(maps, rois, 7, sampling_ratio=2, canonical_size=CANONICAL)
        return pooled, sorted_nms(rois, groups, 0.5)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled, keep = both()
    rois += 5.0
    graph.replay()
    torch.cuda.synchronize()
    expected, kept = both()
    wrong = float((pooled.float() - expected.float()).abs().max()) + float((keep != kept).sum())
    return Figure(value=wrong, unit="difference", most=0.0)


def streamed(context: Context, flavor: str) -> Figure:
    """Compares replayed CUDA graphs with eager execution on frames of `Predictor.stream`."""
    import numpy as np

    from comask.runtime import Predictor
    from comask.runtime.bench.timing import CAPTURED, fill_slots
    from comask.runtime.device import Graph

    bundle = build_engine(context, context.trained_bundle, flavor, "fp16", "python")
    frames = [np.roll(context.images(1)["images"][0], 16 * i, axis=1) for i in range(STREAMED)]
    found, rates = [], []
    with Predictor.load(bundle, f"{flavor}:fp16") as predictor:
        for graphs in (False, True):
            with (
                predictor.stream(graphs=graphs) as session,
                patch.object(Graph, "launch", autospec=True, side_effect=Graph.launch) as launch,
            ):
                fill_slots(session, frames[:1], CAPTURED)
                launch.reset_mock()
                begin = time.perf_counter()
                futures = [session.submit(frame) for frame in frames]
                found.append([future.result() for future in futures])
                rates.append(STREAMED / (time.perf_counter() - begin))
            if launch.call_count != graphs * STREAMED:  # a failed capture only logs a warning
                raise RuntimeError(
                    f"{launch.call_count} of {STREAMED} frames were graphs, with graphs={graphs}"
                )
    worst = max(map(distance, *found))
    note = f"{rates[0]:.0f} frames/s eagerly, {rates[1]:.0f} replayed, host frames"
    return Figure(value=worst, unit="px or %", most=0.01, note=note)


def distance(one: Detections, other: Detections) -> float:
    """Returns the largest difference: boxes in pixels, scores and mask probabilities in percent."""
    import numpy as np

    if one.labels.tolist() != other.labels.tolist():
        return math.inf
    units = {"boxes_xyxy": 1, "scores": 100, "mask_probs": 100}
    return max(
        unit * float(np.abs(getattr(one, name) - getattr(other, name)).max(initial=0.0))
        for name, unit in units.items()
    )


def streamed_masks(context: Context, flavor: str) -> Figure:
    """Compares the bitmaps and RLEs of a stream's masks from the GPU with those from the host."""
    from dataclasses import replace

    import numpy as np
    import torch

    from comask.runtime import Predictor

    bundle = build_engine(context, context.trained_bundle, flavor, "fp16", "python")
    frame = np.ascontiguousarray(context.images(1)["images"][0][:-3, :-5])  # resized by two scales
    with (
        Predictor.load(bundle, f"{flavor}:fp16") as predictor,
        predictor.stream(slots=1) as session,
    ):
        future = session.submit(frame, rle=True)
        bitmaps = torch.from_dlpack(future.bitmaps()).cpu().numpy()
        found = future.result()
    expected = np.zeros_like(bitmaps)
    expected[: len(found)] = found.masks
    strings = zip(found.to_rle(), replace(found).to_rle(), strict=True)
    wrong = int((bitmaps != expected).sum()) + sum(ours != theirs for ours, theirs in strings)
    return Figure(value=float(wrong), unit="pixels and strings", most=0, note=f"{len(found)} masks")


def training_step(context: Context) -> Figure:
    """Trains twenty steps on the GPU in mixed precision; the loss must fall and stay finite."""
    context.need_gpu()
    run = context.folder / "training"
    context.command(
        "train", "--data", "shapes", "--preset", "shapes-tiny", "--output", str(run),
        "--set", "train.max_steps=20", "--set", "train.precision=bf16",
        "--set", "data.shapes_train=64", "--set", "data.shapes_val=8",
    )  # fmt: skip
    import csv

    with (run / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "train"]
    return Figure(
        value=losses[-1] / losses[0],
        unit="of the first loss",
        most=0.999,
        note=f"{len(losses)} rows",
    )


def _engine(context: Context, flavor: str, precision: str, batch: int) -> tuple[Any, Any]:
    from comask.bundle import Bundle
    from comask.runtime.backends import open_stages

    bundle = build_engine(context, context.timed_bundle, flavor, precision, "python")
    stages = open_stages(Bundle.open(bundle), f"{flavor}:{precision}")
    return stages, context.images(batch)


def _engine_seconds(context: Context, flavor: str, precision: str, batch: int) -> float:
    stages, feeds = _engine(context, flavor, precision, batch)
    with stages:
        return wall_seconds(
            lambda: stages.run(feeds["images"], feeds["image_sizes"]), context.sizes.repeats
        )


def _onnxruntime_seconds(context: Context, batch: int) -> float:
    from comask.bundle import Bundle

    feeds = context.images(batch)
    with open_onnxruntime(context, Bundle.open(context.timed_bundle), "fp16") as stages:
        return wall_seconds(
            lambda: stages.run(feeds["images"], feeds["image_sizes"]), context.sizes.repeats
        )


def _torch_seconds(context: Context, batch: int) -> float:
    """Times PyTorch under float16 autocast in channels-last, from host images to host results."""
    context.need_gpu()
    import torch

    from comask.bundle import Bundle
    from comask.runtime.backends import open_stages

    feeds = context.images(batch)
    with (
        open_stages(Bundle.open(context.timed_bundle), "torch") as stages,
        torch.autocast("cuda", torch.float16),
    ):
        return wall_seconds(
            lambda: stages.run(feeds["images"], feeds["image_sizes"]), context.sizes.repeats
        )


def _checks() -> dict[str, Callable[[Context], Figure]]:
    checks: dict[str, Callable[[Context], Figure]] = {
        "custom ops in a captured CUDA graph": captured_graph,
        "training step in bf16": training_step,
    }
    for flavor in FLAVORS:
        checks[f"{flavor} fp16 against PyTorch AMP"] = partial(against_amp, flavor=flavor)
        checks[f"{flavor} fp16 against its fp32"] = partial(against_fp32, flavor=flavor)
        checks[f"{flavor} fp16 streamed, graphs equal eager"] = partial(streamed, flavor=flavor)
        checks[f"{flavor} fp16 streamed, masks equal the host's"] = partial(
            streamed_masks, flavor=flavor
        )
        checks[f"{flavor} memory, batch 8"] = partial(engine_memory, flavor=flavor)
    for batch in IMAGES_PER_SECOND:
        for backend in (*FLAVORS, "onnxruntime", "torch"):
            checks[f"{backend} images per second, batch {batch}"] = partial(
                throughput, backend=backend, batch=batch
            )
    return checks


CHECKS = _checks()
