"""Checks ONNX Runtime on CUDA: its outputs, its AP and its speed."""

from __future__ import annotations

from functools import partial

from building import ap_difference
from clock import wall_seconds
from context import Context
from network import compared
from rows import RUNS, Check, Figure
from runtimes import ORT_WORKS, open_onnxruntime

AP_POINTS = {"fp32": 0.02, "fp16": 0.1, "int8": 0.3}  # limits in AP points


def outputs(context: Context, *, precision: str) -> Figure:
    """Compares the stage outputs with PyTorch on the CPU."""
    stages = open_onnxruntime(context, context.bundle(), precision)
    return compared(context, stages, precision, shapes=True)


def ap(context: Context, *, precision: str) -> Figure:
    """Measures the larger difference of box and mask AP from PyTorch."""
    worst, note = ap_difference(context, context.trained, f"onnxruntime:{precision}")
    most = None if context.rehearsal else AP_POINTS[precision]
    return Figure(value=worst, unit="AP points", most=most, note=note)


def speed(context: Context, *, batch: int) -> Figure:
    """Measures images per second in fp16, host to host."""
    from comask.bundle import Bundle

    feeds = context.images(batch)
    with open_onnxruntime(context, Bundle.open(context.timed), "fp16") as stages:
        took = wall_seconds(lambda: stages.run(**feeds), max(2, context.sizes.repeats // 5))
    return Figure(value=batch / took, unit="images/s", note=f"{1e3 * took:.1f} ms a batch")


def checks() -> list[Check]:
    """Returns the rows of the group."""
    scored = ("opencv", "pycocotools", "faster-coco-eval", "click", "safetensors")
    graphs = {"fp32": (), "fp16": ("fp16 graphs",)}
    rows = []
    for precision, more in graphs.items():
        needs = (ORT_WORKS, "trained bundle", *scored, *more)
        rows += [
            Check(
                name=f"onnxruntime CUDA {precision} equals PyTorch", limit=60, needs=needs,
                run=partial(outputs, precision=precision), compared="PyTorch in fp32 on the CPU",
                fails=f"an output differs beyond the tolerance of {precision}",
            ),
            Check(
                name=f"onnxruntime CUDA {precision}, AP", limit=120, needs=needs,
                run=partial(ap, precision=precision), compared="AP of PyTorch on the same images",
                fails=f"box or mask AP differs by more than {AP_POINTS[precision]:g} points",
            ),
        ]  # fmt: skip
    return rows + [
        Check(
            name=f"onnxruntime CUDA images per second, batch {batch}", run=partial(speed, batch=batch),
            needs=(ORT_WORKS, "timed bundle"), limit=90, compared=RUNS, fails="it does not run",
        )
        for batch in (1, 8)
    ]  # fmt: skip
