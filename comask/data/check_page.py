"""Writes the page of `comask check`: counts, problems, histograms, and pictures worth a look."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from comask.data.check_pictures import worst_cases
from comask.data.source import InstanceSource
from comask.data.summary import Summary
from comask.data.survey import MEDIUM, SMALL, Survey
from comask.errors import ComaskError
from comask.files import write_whole
from comask.page import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("check_page.html.jinja")
_BINS = 40


def require_matplotlib() -> None:
    """Checks that a page's figures can be drawn, before a data set is read.

    Raises:
        ComaskError: when matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ComaskError("--page needs matplotlib: pip install 'comask[train]'") from error


def write_check_page(source: InstanceSource, summary: Summary, path: Path, *, title: str) -> None:
    """Writes a self-contained page about a data set, atomically.

    Args:
        source: the data set, which `open_source` has checked.
        summary: its counts and problems.
        path: the page's file.
        title: the page's title.

    Raises:
        ComaskError: when the file cannot be written.
    """
    survey = Survey.of(source, summary.problems)
    drawn = {"image size": _image_sizes, "objects per image": _per_image}
    if summary.objects:
        drawn = {"object size": _object_sizes} | drawn
    page = render(
        TEMPLATE,
        title=title,
        summary=summary,
        of_sizes=survey.of_sizes(),
        limits=(SMALL, MEDIUM),
        figures={name: _figure(partial(draw, survey=survey)) for name, draw in drawn.items()},
        pictures=worst_cases(source, survey),
    )
    try:
        write_whole(path, page)
    except OSError as error:
        raise ComaskError(f"--page {path}: cannot be written: {error.strerror}") from error


def _object_sizes(axes: Axes, survey: Survey) -> None:
    """Draws the histogram of the objects' sizes with COCO's limits."""
    ends = min(survey.sides.min(), SMALL / 2), max(survey.sides.max(), MEDIUM * 2)
    axes.hist(survey.sides, bins=np.geomspace(*ends, _BINS + 1).tolist())
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="square root of the area, pixels", ylabel="objects")
    for limit in (SMALL, MEDIUM):
        axes.axvline(limit, color="gray", linestyle="--")
    sides = zip(
        (0.0, 0.5, 1.0), ("left", "center", "right"), survey.of_sizes().items(), strict=True
    )
    for place, side, (name, count) in sides:
        axes.text(place, 1.02, f"{name}: {count:,}", transform=axes.transAxes, ha=side)


def _image_sizes(axes: Axes, survey: Survey) -> None:
    heights, widths = survey.image_sizes.T
    bins = np.histogram_bin_edges(survey.image_sizes, _BINS).tolist()
    axes.hist([widths, heights], bins=bins, label=["width", "height"])
    axes.set(xlabel="pixels", ylabel="images")
    axes.legend()


def _per_image(axes: Axes, survey: Survey) -> None:
    most = int(survey.per_image.max())
    step = -(-(most + 1) // _BINS)
    bins = (np.arange(0, most + step + 1, step) - 0.5).tolist()
    axes.hist(survey.per_image, bins=bins)
    axes.set(xlabel="objects", ylabel="images")


def _figure(draw: Callable[[Axes], None]) -> bytes:
    """Returns a PNG, drawn without pyplot and its global backend."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
