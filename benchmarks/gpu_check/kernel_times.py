"""Measures the times of the kernels: queued launches between two events, as replayed CUDA graphs."""

from __future__ import annotations

import time
from functools import partial

from clock import QUEUED, seconds
from context import Context
from kernel_inputs import (
    CELLS,
    DETECTIONS,
    FULL_HD,
    boxes_with_ties,
    empty,
    mask_edges,
    mask_inputs,
    nms_on_device,
    noise_pyramid,
    nv12,
    roi_align,
    run_launch,
)  # fmt: skip
from kernel_values import torchvision_pool
from rows import Check, Figure

LIMITS_ARE_FOR = "H200"
# Microseconds on an H200: twice what was estimated from traffic and occupancy before any GPU ran them.
LIMITS = {
    "RoIAlign f16 channels last": 90.0, "RoIAlign f16 planes": 500.0, "NMS of 5 x 1000 boxes": 30.0,
    "frame to canvas, NV12 1920x1080": 24.0, "100 masks pasted": 500.0, "edges of 100 masks": 160.0,
}  # fmt: skip


def kernel_time(context: Context, *, name: str) -> Figure:
    """Times one kernel on the data of a whole image."""
    call = CALLS[name](context)
    took = seconds(call, context.sizes.repeats, context.device)
    judged = not context.rehearsal and LIMITS_ARE_FOR in _gpu()
    return Figure(value=1e6 * took, unit="us", most=LIMITS[name] if judged else None)


def roi_ratio(context: Context) -> Figure:
    """Compares the faster layout of our RoIAlign with torchvision's pooling of the same pyramid."""
    planes, rois = noise_pyramid(context, half=True, channels_last=False)
    theirs = seconds(
        lambda: torchvision_pool(planes, rois, 7), context.sizes.repeats, context.device
    )
    ours = {
        last: seconds(_roi(context, channels_last=last), context.sizes.repeats, context.device)
        for last in (False, True)
    }
    note = f"{1e6 * min(ours.values()):.0f} us against {1e6 * theirs:.0f} us"
    least = None if context.rehearsal else 3.0
    return Figure(value=theirs / min(ours.values()), unit="times as fast", least=least, note=note)


def nms_ratio(context: Context) -> Figure:
    """Compares NMS on five rows of 1000 boxes with torchvision's NMS row by row."""
    import torch
    import torchvision

    boxes = boxes_with_ties(5, context.sizes.proposals)[0].to(context.device)
    rank = torch.arange(boxes.shape[1], 0, -1, dtype=torch.float32, device=context.device)
    ours = seconds(_nms(context), context.sizes.repeats, context.device)
    theirs = seconds(
        lambda: [torchvision.ops.nms(row, rank, 0.7) for row in boxes],
        context.sizes.repeats,
        context.device,
    )
    note = f"{1e6 * ours:.0f} us against {1e6 * theirs:.0f} us, which waits for the GPU row by row"
    least = None if context.rehearsal else 1.0
    return Figure(value=theirs / ours, unit="times as fast", least=least, note=note)


def edges_to_host(context: Context) -> Figure:
    """Times the search for the edges of 100 masks and the copy of their edges to the host."""
    inputs = mask_inputs(context)
    size = context.sizes.width

    def once() -> None:
        counts, edges = mask_edges(context, inputs)
        edges[: int(counts[:DETECTIONS].sum())].cpu()

    once()
    start = time.perf_counter()
    for _ in range(context.sizes.repeats):
        once()
    took = (time.perf_counter() - start) / context.sizes.repeats
    return Figure(
        value=1e6 * took, unit="us", note=f"{DETECTIONS} masks, {size} columns, by the wall clock"
    )


def launch_cost(context: Context) -> Figure:
    """Measures how long Python takes to queue one kernel."""
    call = _keep(context)
    call()
    start = time.perf_counter()
    for _ in range(QUEUED):
        call()
    took = (time.perf_counter() - start) / QUEUED
    if not context.rehearsal:
        import torch

        torch.cuda.synchronize()
    return Figure(value=1e6 * took, unit="us", note="one processor core, without a graph")


def _gpu() -> str:
    import torch

    return str(torch.cuda.get_device_name(0))


def _roi(context: Context, *, channels_last: bool):  # type: ignore[no-untyped-def]
    maps, rois = noise_pyramid(context, half=True, channels_last=channels_last)
    return partial(run_launch, *roi_align(maps, rois, 7))


def _nms(context: Context):  # type: ignore[no-untyped-def]
    boxes, groups = boxes_with_ties(5, context.sizes.proposals)
    return nms_on_device(context, boxes, groups, 0.7)[0]


def _keep(context: Context):  # type: ignore[no-untyped-def]
    from comask.kernels.launch import nms_keep_launch

    words = empty(context, (1, 1, 32), "int32").zero_()
    return partial(run_launch, nms_keep_launch(1, 32), [words], empty(context, (1, 32), "bool"))


def _paste(context: Context):  # type: ignore[no-untyped-def]
    from comask.kernels.launch import MaskLaunches

    size = (context.sizes.height, context.sizes.width) if context.rehearsal else FULL_HD
    launch = MaskLaunches(DETECTIONS, CELLS, size, 0.5).bitmaps()
    return partial(
        run_launch, launch, mask_inputs(context), empty(context, (DETECTIONS, *size), "uint8")
    )


def _edges(context: Context):  # type: ignore[no-untyped-def]
    return partial(mask_edges, context, mask_inputs(context))


CALLS = {
    "RoIAlign f16 channels last": partial(_roi, channels_last=True),
    "RoIAlign f16 planes": partial(_roi, channels_last=False),
    "NMS of 5 x 1000 boxes": _nms,
    "frame to canvas, NV12 1920x1080": lambda context: partial(run_launch, *nv12(context)),
    "100 masks pasted": _paste,
    "edges of 100 masks": _edges,
}


def checks() -> list[Check]:
    """Returns the rows of the group."""
    twice = "twice the time estimated for an H200; on another GPU, nothing"
    return [
        *(
            Check(
                name=f"time of {name}", run=partial(kernel_time, name=name), needs=("kernels",),
                compared=twice, fails="it takes more on an H200, so the estimate was wrong",
            )
            for name in LIMITS
        ),
        Check(
            name="RoIAlign's speed against torchvision's", run=roi_ratio, needs=("kernels",),
            compared="torchvision's roi_align on each level of the same f16 pyramid",
            fails="it is less than three times as fast",
        ),
        Check(
            name="NMS's speed against torchvision's", run=nms_ratio, needs=("kernels",),
            compared="torchvision's nms row by row", fails="it is slower",
        ),
        Check(
            name="edges of 100 masks to the host, time", run=edges_to_host, needs=("kernels",),
            compared="nothing: a figure for docs/performance.md", fails="it does not run",
        ),
        Check(
            name="time to queue a kernel from Python", run=launch_cost, needs=("kernels",),
            compared="nothing: what a CUDA graph saves", fails="it does not run",
        ),
    ]  # fmt: skip
