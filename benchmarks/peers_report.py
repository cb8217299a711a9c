"""Turns the measurements of `vs_peers.py` into ratios with their uncertainty, tables and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comask.errors import ComaskError
from comask.runtime.bench.machine import Machine

PARTS = ("prepare", "network", "masks")
COLORS = ("#9ecae1", "#3182bd", "#e6550d")
BEGIN, END = "<!-- peers table -->", "<!-- end of peers table -->"
ROUNDING = ("bf16", "fp16", "int8")
RESAMPLES = 4000
MIB = 2**20


def row(seconds: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Returns the median milliseconds of each part, and the ratio to the reference.

    Args:
        seconds: the seconds of each run, by `PARTS`.
        reference: the seconds of the reference, whose runs took turns with these.
    """
    own, other = np.asarray(seconds), np.asarray(reference)
    medians = np.median(own, axis=0) * 1000
    return {
        **dict(zip(PARTS, medians.tolist(), strict=True)),
        "sum": float(np.median(own.sum(1)) * 1000),
        "network_ratio": ratio(other[:, 1], own[:, 1]),
        "ratio": ratio(other.sum(1), own.sum(1)),
    }


def ratio(reference: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Returns the ratio of the medians and both ends of its 95 % interval, bootstrapped over turns."""
    turns = np.random.default_rng(0).integers(0, len(seconds), (RESAMPLES, len(seconds)))
    drawn = np.median(reference[turns], axis=1) / np.median(seconds[turns], axis=1)
    middle = np.median(reference) / np.median(seconds)
    return [float(middle), *np.percentile(drawn, (2.5, 97.5)).tolist()]


def tables(report: dict[str, Any]) -> str:
    """Returns Markdown tables of the models and the times of each case, and the machine."""
    canvases = list(next(iter(report["models"].values()))["gflop"])
    lines = [_line("network", "parameters", *(f"GFLOP at {canvas}" for canvas in canvases))]
    lines.append(_line(*["---"] * (2 + len(canvases))))
    for name, model in report["models"].items():
        figures = (f"{model['gflop'][canvas]:.0f}" for canvas in canvases)
        lines.append(_line(name, f"{model['parameters'] / 1e6:.1f} M", *figures))
    heads = (
        "canvas", "detections", "model", "network ms", "ratio", "masks ms", "end to end ms", "ratio",
        "AP of boxes, masks",
    )  # fmt: skip
    lines += ["", _line(*heads), _line(*["---"] * len(heads))]
    for case in report["cases"]:
        for name, found in case["rows"].items():
            lines.append(
                _line(
                    "{}x{}".format(*case["canvas"]),
                    case["detections"],
                    name,
                    f"{found['network']:.0f}",
                    _interval(found["network_ratio"]),
                    f"{found['masks']:.1f}",
                    f"{found['sum']:.0f}",
                    _interval(found["ratio"]),
                    accuracy(name, report["accuracy"]),
                )
            )
    lines += ["", _line("model", "files MiB", "peak memory MiB"), _line(*["---"] * 3)]
    for name, found in report["contestants"].items():
        sizes = (f"{found[key] / MIB:.0f}" for key in ("files", "memory"))
        lines.append(_line(name, *sizes))
    lines += ["", footnote(report)]
    return "\n".join(lines)


def accuracy(name: str, measured: dict[str, Any] | None) -> str:
    """Returns the AP points by which a contestant differs from fp32, as `comask eval` measured them."""
    model, _, backend = name.partition(" ")
    if not any(backend.endswith(precision) for precision in ROUNDING):
        return "as trained"
    compared = measured["comparisons"].get(backend) if measured and model == "comask" else None
    if compared is None:
        return "not measured"
    return ", ".join(f"{compared['deltas'][task]['AP']:+.2f}" for task in ("bbox", "segm"))


def footnote(report: dict[str, Any]) -> str:
    """Returns when and where it was measured, and which contestants were not measured."""
    machine = report["machine"]
    versions = machine["versions"]
    shown = [name for name in ("torch", "onnxruntime", "openvino") if name in versions]
    packages = ", ".join(f"{name} {versions[name]}" for name in shown)
    text = (
        f"{report['when'][:10]}, {Machine(**machine)}, {packages}; PyTorch with "
        f"{report['threads']} threads, ONNX Runtime with its default; medians of {report['runs']} turns."
    )
    if measured := report["accuracy"]:
        text += f" AP: PyTorch's, on {measured['images']} images of {measured['data']}."
    for name, reason in report["unavailable"].items():
        text += f" Not measured: {name} ({reason})."
    return text


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws one panel per case and one bar per model, divided into its parts."""
    from matplotlib.figure import Figure

    cases = report["cases"]
    counts = list(dict.fromkeys(case["detections"] for case in cases))
    height = len(cases) // len(counts)
    names = list(report["contestants"])[::-1]  # the first on top
    figure = Figure(figsize=(11, 1.2 + height * (0.5 + 0.3 * len(names))), layout="constrained")
    panels = figure.subplots(height, len(counts), sharey=True, squeeze=False)
    for axes, case in zip(panels.flat, cases, strict=True):
        left = np.zeros(len(names))
        for part, color in zip(PARTS, COLORS, strict=True):
            values = np.array([case["rows"][name][part] for name in names])
            axes.barh(names, values, left=left, color=color, label=part, height=0.65)
            left += values
        for place, name in enumerate(names):
            found = case["rows"][name]
            text = f" {found['sum']:.0f} ms, {found['ratio'][0]:.2f}x"
            axes.text(left[place], place, text, va="center", fontsize=8)
        axes.set_xlim(0, 1.3 * left.max())
        canvas = "x".join(map(str, case["canvas"]))
        axes.set_title(f"{canvas}, {case['detections']} detections", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    machine = Machine(**report["machine"])
    figure.suptitle(
        f"median ms per photo; x: times as fast as {report['reference']}; {machine}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def check_page(path: Path) -> None:
    """Raises ComaskError if a page has no markers for the tables."""
    text = path.read_text(encoding="utf-8")
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise ComaskError(f"{path}: expected {BEGIN} and, after it, {END}")


def write_page(report: dict[str, Any], path: Path) -> None:
    """Writes the tables between the markers of a page."""
    check_page(path)
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{tables(report)}\n{END}{after}", encoding="utf-8")


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _interval(values: Sequence[float]) -> str:
    middle, low, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
