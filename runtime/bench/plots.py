"""Draws the reports' pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comask.errors import ComaskError, one_line
from comask.files import write_whole
from comask.runtime.bench import growth
from comask.runtime.bench.latency import LatencyReport
from comask.runtime.bench.machine import MIB, Machine
from comask.runtime.bench.soak import SoakReport
from comask.runtime.bench.sweep import SweepReport, SweepRow
from comask.runtime.bench.timing import PARTS, SUM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
COLORS = ("#9ecae1", "#3182bd", "#e6550d", "#bdbdbd", "#a1d99b", "#31a354")  # for `PARTS`
CHOSEN, LIMIT = "#d62728", "#888888"
MARKERS = "osD^vP"
SOAK_PANELS = (  # label, and the names of the series in the report
    ("memory, MiB", ("resident_bytes",)),
    ("GPU memory, MiB", ("gpu_bytes",)),
    ("threads and files", ("threads", "files")),
    ("CPU ms per image", ("cpu_ms",)),
    ("calls, ms", ("call_p50_ms", "call_p99_ms")),
    ("stream, ms", ("stream_p50_ms", "stream_p99_ms")),
    ("share waited", ("waited",)),
    ("clock, MHz", ("clock_mhz",)),
)
FAR = 10.0  # losses above this many limits are drawn at the edge, so that the others have room


def check_plot(path: Path) -> None:
    """Checks that a picture can be drawn, before anything is measured.

    Raises:
        ComaskError: if the name ends otherwise, or matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ComaskError(f"--plot {path}: expected a name that ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ComaskError("--plot needs matplotlib: pip install 'comask[train]'") from error


def draw_latency(report: LatencyReport, path: Path) -> None:
    """Draws the median time as one bar per backend, divided in proportion to the medians of its parts.

    The medians of the parts do not add up to the median of their sums, which label and table show.
    """
    figure = _figure(9, 1.9 + 0.6 * len(report.backends))
    axes = figure.subplots()
    names = list(report.backends)[::-1]  # the first on top
    medians = [
        {part: ranks.p50 for part, ranks in report.backends[name].milliseconds.items()}
        for name in names
    ]
    scales = [of_part[SUM] / sum(of_part[part] for part in PARTS) for of_part in medians]
    left = [0.0] * len(names)
    for (part, label), color in zip(PARTS.items(), COLORS, strict=True):
        values = [scale * of_part[part] for scale, of_part in zip(scales, medians, strict=True)]
        axes.barh(names, values, left=left, color=color, label=label, height=0.6)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, (name, end) in enumerate(zip(names, left, strict=True)):
        text = f" {end:.4g} ms, ratio {report.backends[name].ratio:.2f}"
        axes.text(end, place, text, va="center", fontsize=9)
    axes.set_xlim(0, 1.22 * max(left))
    what = "image" if report.batch == 1 else f"batch of {report.batch}"
    axes.set_xlabel(f"median milliseconds per {what}, in proportion to the medians of its parts")
    _title(axes, report.subject, report.machine)
    figure.legend(loc="outside lower center", ncols=len(COLORS), fontsize=9, frameon=False)
    _clear(axes)
    _save(figure, path)


def draw_sweep(report: SweepReport, path: Path) -> None:
    """Draws each setting's AP loss against its time, the Pareto front, and the choice.

    The settings on the front are numbered, and explained beside the picture.
    """
    rows, top = report.settings, top_of_losses(report)
    front = [row for row in rows if row.on_front]
    figure = _figure(12, max(5.5, 3.0 + 0.42 * len(front)))  # the legend names all of the front
    axes = figure.subplots()
    near = [row for row in rows if row.loss <= top]
    for number, backend in enumerate(dict.fromkeys(row.backend for row in rows)):
        marker, color = MARKERS[number % len(MARKERS)], f"C{number}"
        points = _places([row for row in near if row.backend == backend])
        axes.scatter(*points, marker=marker, color=color, alpha=0.7, s=36, label=backend)
    if far := [row for row in rows if row.loss > top]:
        axes.scatter(
            _places(far)[0], [top] * len(far), marker="^", facecolors="none", edgecolors=LIMIT, s=50,
            label=f"loses more than {top:.2g}", clip_on=False,
        )  # fmt: skip
    chosen = _places([row for row in rows if row.chosen])
    axes.scatter(
        *chosen, s=190, facecolors="none", edgecolors=CHOSEN, linewidths=2,
        label="fastest within the loss",
    )  # fmt: skip
    axes.axhline(
        report.max_loss, color=LIMIT, linestyle="--", linewidth=1,
        label=f"--max-loss {report.max_loss:g}",
    )  # fmt: skip
    times, losses = _places(front)
    # losses beyond the top are drawn at the edge, as their marks are
    losses = [min(loss, top) for loss in losses]
    axes.step(
        times, losses, where="post", color="black", linewidth=1, zorder=1, clip_on=False,
        label="Pareto front",
    )  # fmt: skip
    for number, (row, time, loss) in enumerate(zip(front, times, losses, strict=True), 1):
        axes.plot(
            [], [], " ", marker=f"${number}$", color="black", label=_named(row),
            markersize=6 if number < 10 else 10,
        )  # fmt: skip
        axes.annotate(
            str(number), (time, loss), xytext=(7, 7 if row in near else -15),
            textcoords="offset points", fontweight="bold",
        )  # fmt: skip
    axes.set_xlabel("milliseconds per image")
    axes.set_ylabel("AP points lost by boxes or masks, whichever is more")
    _title(axes, f"{report.images} images of {report.data}", report.machine)
    axes.grid(alpha=0.3)
    axes.set_ylim(top=top)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False, labelspacing=0.8)
    _clear(axes)
    _save(figure, path)


def draw_soak(report: SoakReport, path: Path) -> None:
    """Draws each series over the minutes, and the levels that were compared.

    Args:
        report: a report with samples.
        path: path of the picture.
    """
    minutes = [seconds / 60 for seconds in report.times]
    warm_up = (report.warm_up_seconds or 0.0) / 60
    part = (minutes[-1] - warm_up) / growth.PARTS
    first, last = (warm_up, warm_up + part), (minutes[-1] - part, minutes[-1])
    series = report.series
    panels = [panel for panel in SOAK_PANELS if any(_worth(series, name) for name in panel[1])]
    behind = [place for place, minute in enumerate(minutes) if minute > warm_up]
    figure = _figure(9, 0.8 + 1.7 * len(panels))
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, names) in zip(rows, panels, strict=True):
        scale = MIB if label.endswith("MiB") else 1
        judged = []
        for name in filter(series.__contains__, names):
            known = growth.LIMITS[name].name if name in growth.LIMITS else ""
            values = [value / scale for value in series[name]]
            axes.plot(minutes, values, linewidth=1, label=known)
            judged += [values[place] for place in behind]
            if grown := report.growth.get(name):
                color = LIMIT if grown.passed else CHOSEN
                axes.hlines(grown.before / scale, *first, color=color, zorder=3)
                axes.hlines(grown.after / scale, *last, color=color, zorder=3)
        _scale(axes, label, judged)
        axes.axvspan(0, warm_up, color=LIMIT, alpha=0.15, linewidth=0)
        axes.set_ylabel(label, fontsize=9)
        if len(names) > 1:
            axes.legend(
                loc="lower right", bbox_to_anchor=(1, 0.95), fontsize=8, frameon=False, ncols=4
            )
        _clear(axes)
    rows[-1].set_xlabel("minutes; gray: warm-up, which is not judged")
    rows[-1].set_xlim(0, minutes[-1])
    _title(rows[0], f"{report.runs_as}, {report.subject}", report.machine)
    _save(figure, path)


def _worth(series: dict[str, list[float]], name: str) -> bool:
    """Returns whether a series is worth a panel, which a clock that never changes is not."""
    values = series.get(name, [])
    return bool(values) and (name != "clock_mhz" or min(values) < max(values))


def _scale(axes: Axes, label: str, values: list[float]) -> None:
    """Scales the axis for the values that are judged, regardless of the warm-up.

    The axis of memory spans at least 1 % both ways, which is the limit; threads and files are whole
    numbers.
    """
    from matplotlib.ticker import MaxNLocator

    if not values:
        return
    low, high = min(values), max(values)
    if label.endswith("MiB"):
        middle = (low + high) / 2
        low, high = min(low, 0.99 * middle), max(high, 1.01 * middle)
    elif label.startswith("threads"):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        low, high = low - 1, high + 1
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def top_of_losses(report: SweepReport) -> float:
    """Returns the upper end of the loss axis, such that the limit is visible beside far larger losses."""
    limit = report.max_loss
    largest = max(limit, *(row.loss for row in report.settings))
    return 1.05 * max(0.1, min(largest, max(FAR * limit, 1.0)))


def _places(rows: Sequence[SweepRow]) -> tuple[list[float], list[float]]:
    return [row.ms_per_image for row in rows], [row.loss for row in rows]


def _named(row: SweepRow) -> str:
    """Returns the two lines of the legend for a setting on the front."""
    own = " (the bundle's own)" if row.reference else ""
    worth = f"{row.ms_per_image:.3g} ms, {row.loss:+.2f} points{own}"
    return f"{row.without_batch},\nbatch {row.batch}: {worth}"


def _title(axes: Axes, subject: str, machine: Machine) -> None:
    # parse_math is off because a file's name may contain dollar signs
    text = one_line(f"{subject}, {machine}")
    axes.set_title(text, fontsize=9, pad=12, parse_math=False)


def _clear(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches, without pyplot and its global backend."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=120)
    write_whole(path, content.getvalue())
