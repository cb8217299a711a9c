"""Of the page of `comask-eval`: how the lower precisions' graphs came about, and what stayed float."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comask.page import facts, table


def precision_sections(verification: Mapping[str, Any]) -> list[str]:
    """A section on fp16 and one on int8, where the bundle has them.

    Args:
        verification: of the bundle's manifest.
    """
    makers = {"fp16": _fp16, "int8": _int8}
    return [make(verification[name]) for name, make in makers.items() if name in verification]


def _fp16(proof: Mapping[str, Any]) -> str:
    islands = proof.get("float_layers", [])  # older bundles have no such list
    if not islands:
        return ""
    rows = [
        (island["module"], f"{island['largest']:.4g}", island["image"], island["reason"])
        for island in islands
    ]
    listed = table(("module that stays f32", "largest value", "on image", "reason"), rows)
    return f"<h2>How fp16 was made</h2>{listed}"


def _int8(proof: Mapping[str, Any]) -> str:
    calibration, sizes, (loss, error) = proof["calibration"], proof["bytes"], proof["loss"]
    kept = proof["float_layers"]
    times = proof["latency"]
    summary = facts(
        [
            ("calibrated on", f"{calibration['images']} images of {calibration['data']}"),
            ("by", f"{calibration['method']}, seed {calibration['seed']}"),
            ("layers in int8", f"{proof['layers'] - len(kept)} of {proof['layers']}"),
            ("points lost", f"{loss:+.2f} ± {error:.2f} of {proof['budget']:g} allowed"),
            ("on", f"{proof['images']} images of {proof['data']}"),
            ("ms an image", f"{1e3 * times['int8']:.2f}, fp16 {1e3 * times['fp16']:.2f}" if times
             else "not measured"),
        ]
    )  # fmt: skip
    ap = table(
        ("AP points", "PyTorch", "int8"),
        [(task, f"{value:.2f}", f"{proof['ap'][task]:.2f}")
         for task, value in proof["reference"].items()],
    )  # fmt: skip
    size = table(
        ("graphs", "MB", "of fp32"),
        [(name, f"{count / 1e6:.2f}", f"{count / sizes['fp32']:.3f}")
         for name, count in sizes.items()],
    )  # fmt: skip
    trials = table(
        ("float layers", "points lost", "± standard error"),
        [(str(trial["float_layers"]), f"{trial['loss']:+.2f}", f"{trial['error']:.2f}")
         for trial in proof["trials"]],
    )  # fmt: skip
    floats = (
        table(("layer that stays float", "reason"), [(e["layer"], e["reason"]) for e in kept])
        if kept
        else "<p>Every layer is int8.</p>"
    )
    return f"<h2>How int8 was made</h2>{summary}{ap}{floats}<h3>Trials</h3>{trials}<h3>Sizes</h3>{size}"
