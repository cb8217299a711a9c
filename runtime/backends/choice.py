"""What `auto` tries, and in which order."""

from __future__ import annotations

from comask.bundle import Bundle, Manifest
from comask.runtime.backends.names import Device, gpu_index, graph_precision, parse_backend
from comask.runtime.gpu import find_gpu

# Without measurements, the fastest first. TensorRT takes the lowest precision of the bundle's engines,
# which were compared with PyTorch when they were built.
ON_GPU = ("tensorrt", "tensorrt-rtx", "onnxruntime", "torch")
ON_CPU = (
    "openvino:int8", "openvino:bf16", "openvino:fp16", "onnxruntime", "openvino", "torch:bf16", "torch",
)  # fmt: skip


def candidates(bundle: Bundle, device: Device) -> list[str]:
    """Returns names of backends, the fastest first.

    A backend that rounds is left out unless `comask eval` has recorded that it loses no more AP than the
    bundle tolerates. If `comask bench` has timed backends on this machine, its fastest comes first.
    """
    # imported late, since it imports this package
    from comask.runtime.bench.machine import processor

    index, manifest = gpu_index(device), bundle.manifest
    there = index is not None and find_gpu(index) is not None
    first = ON_GPU if there else ON_GPU[:2]  # TensorRT's says why it does not run
    allowed = [name for name in ON_CPU if is_proved(manifest, name)]
    seconds = recorded_seconds(manifest, processor())
    timed = {name: seconds[name] for name in allowed if name in seconds}
    fastest = [min(timed, key=lambda name: timed[name])] if len(timed) > 1 else []
    return list(dict.fromkeys([*first, *fastest, *allowed]))


def is_proved(manifest: Manifest, name: str) -> bool:
    """Returns whether a backend computes in fp32, or every record of its AP is within the tolerance."""
    from comask.runtime.parity.verdict import ap_tolerance

    precision = parse_backend(name)[1]
    if precision == "fp32":
        return True
    if graph_precision(*parse_backend(name)) not in manifest.precisions:
        return False
    compared = [
        entry["comparisons"][name]
        for entry in manifest.parity
        if name in entry["comparisons"]
        and entry.get("proposals") is None
        and entry.get("short_side") is None
    ]
    tolerance = ap_tolerance(manifest, precision)
    return bool(compared) and all(
        record["passed"] and record["largest"] <= tolerance for record in compared
    )


def recorded_seconds(manifest: Manifest, cpu: str) -> dict[str, float]:
    """Returns the seconds per image of backends that were timed on a processor of this name."""
    found: dict[str, float] = {}
    for key, record in (manifest.latency or {}).items():
        if record["device"] != "cpu" or record["machine"]["cpu"] != cpu:
            continue
        name = key.partition(" on ")[0].removesuffix(":fp32")
        seconds = record["seconds"]["sum"] / record["batch"]
        found[name] = min(seconds, found.get(name, seconds))
    return found
