"""Checks int8: the search for a placement, and AP and speed of its engines in each flavor."""

from __future__ import annotations

from functools import partial

from building import FLAVORS, WORKS, ap_difference, build_engine, engine_bundle
from context import Context
from onnxruntime_cuda import AP_POINTS
from rows import Check, Figure
from runtimes import ANY_ENGINE

PROVIDES = "int8 graphs"
IMAGES = "60"  # on which the search measures AP, again and again


def quantized(context: Context) -> Figure:
    """Quantizes the trained bundle on `shapes`, unless it has int8 graphs."""
    if "int8" not in context.bundle().manifest.precisions:
        context.command(
            "quantize", str(context.trained), "--calib-data", "shapes", "--data", "shapes",
            "--limit", IMAGES, "--calib-limit", "32", "--max-loss", str(AP_POINTS["int8"]),
        )  # fmt: skip
    return Figure(value=1.0, note=", ".join(context.bundle().manifest.precisions))


def ap(context: Context, *, flavor: str) -> Figure:
    """Measures the larger difference of box and mask AP of int8 engines from PyTorch."""
    bundle = engine_bundle(context, flavor, label="int8")
    build_engine(context, bundle, flavor, "int8")
    worst, note = ap_difference(context, bundle, f"{flavor}:int8")
    return Figure(value=worst, unit="AP points", most=AP_POINTS["int8"], note=note)


def speed(context: Context, *, flavor: str) -> Figure:
    """Returns the speed of int8 relative to fp16, as `comask build` measures it."""
    from comask.bundle import Bundle

    bundle = engine_bundle(context, flavor, label="int8")
    for precision in ("fp16", "int8"):
        build_engine(context, bundle, flavor, precision)
    seconds = Bundle.open(bundle).manifest.verification["int8"]["latency"]
    note = f"{1e3 * seconds['int8']:.2f} ms per image, fp16 {1e3 * seconds['fp16']:.2f} ms"
    return Figure(value=seconds["fp16"] / seconds["int8"], unit="x", least=1.0, note=note)


def checks() -> list[Check]:
    """Returns the rows of the group."""
    needs = ("real GPU", "fp16 graphs", "trained bundle", "onnx", "onnxruntime", "faster-coco-eval")
    rows = [
        Check(
            name="int8 graphs of the trained bundle", run=quantized, needs=(ANY_ENGINE, *needs),
            provides=PROVIDES, limit=600, compared="AP of PyTorch on the same images",
            fails=f"no placement of int8 loses at most {AP_POINTS['int8']:g} AP points",
        )
    ]  # fmt: skip
    for flavor in FLAVORS:
        rows += [
            Check(
                name=f"{flavor} int8, AP", run=partial(ap, flavor=flavor), isolated=True,
                needs=(WORKS[flavor], PROVIDES), limit=300, compared="AP of PyTorch",
                fails=f"box or mask AP differs by more than {AP_POINTS['int8']:g} points",
            ),
            Check(
                name=f"{flavor} int8, against fp16", run=partial(speed, flavor=flavor), isolated=True,
                needs=(WORKS[flavor], PROVIDES), limit=300, compared="fp16 engines of the same bundle",
                fails="int8 is slower than fp16",
            ),
        ]  # fmt: skip
    return rows
