"""Which modules of an fp16 network stay fp32 inside, so that nothing overflows.

Around a layer that exceeds fp16's range, the smallest module that takes and gives values within it
becomes a *float island*.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from comask.errors import PrecisionError
from comask.export.range_scan import ACTIVATIONS, FP16_END, Extreme


def float_islands(extremes: Sequence[Extreme]) -> dict[str, Extreme]:
    """The smallest modules to keep in fp32 so that no value exceeds fp16 outside of them.

    Args:
        extremes: see `scan_ranges`.

    Returns:
        by path, none inside another: the worst value that the module is kept for.

    Raises:
        PrecisionError: when a value has no such module around it, as those that stage 1 hands to stage 2.
    """
    beyond = sorted((e for e in extremes if not e.fits), key=lambda e: -e.largest)
    called = {e.module for e in extremes if e.kind in ACTIVATIONS}
    quiet = called.difference(e.module for e in beyond if e.kind in ACTIVATIONS)
    worst, homeless = dict[str, Extreme](), list[Extreme]()
    for extreme in beyond:
        home = next((path for path in _lineage(extreme.module) if path in quiet), None)
        if home is None:
            homeless.append(extreme)
        else:
            worst.setdefault(home, extreme)
    if homeless:
        outermost = min(homeless, key=lambda e: e.module.count("."))
        raise PrecisionError(
            f"this network does not fit fp16: {outermost}, and no module around it could be kept in "
            f"fp32; use fp32"
        )
    return {path: e for path, e in worst.items() if not _inside(path, worst)}


def describe_islands(extremes: Sequence[Extreme], islands: Mapping[str, Extreme]) -> dict[str, Any]:
    """For the manifest: `float_layers`, and as `range` the largest value that remains in fp16.

    Args:
        extremes: see `scan_ranges`.
        islands: see `float_islands`.
    """
    halves = [
        e
        for e in extremes
        if not _inside(e.module, islands)
        and (e.module not in islands or e.kind in ACTIVATIONS)  # its border is fp16
    ]
    largest = max(halves, key=lambda e: e.largest)
    return {
        "float_layers": [
            {"module": path, "largest": e.largest, "image": e.image, "reason": str(e)}
            for path, e in islands.items()
        ],
        "range": {
            "module": largest.module,
            "kind": largest.kind,
            "largest": largest.largest,
            "image": largest.image,
            "end": FP16_END,
        },
    }


def _lineage(path: str) -> Iterator[str]:
    """`a.b.c` → `a.b.c`, `a.b`, `a`."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _inside(path: str, islands: Collection[str]) -> bool:
    """Whether a module lies in one of the islands, and is none itself."""
    return any(outer in islands for outer in _lineage(path.rpartition(".")[0]))
