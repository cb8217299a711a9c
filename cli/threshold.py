"""`--threshold` of `comask infer`: the lowest score that is drawn, one for all or each class its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import click

from comask.bundle import Bundle
from comask.errors import BundleError

FOR_TOOLS = ("dataset", "labelstudio")  # kinds of results that other tools import
THRESHOLDED = ("overlay", "page", *FOR_TOOLS)  # kinds of results for which the threshold counts
Threshold: TypeAlias = float | tuple[float, ...]  # of all classes, or of each label


class ThresholdType(click.ParamType[float | Literal["auto"]]):
    """A score in 0..1, or `auto`."""

    name = "P|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | Literal["auto"]:
        """Returns the number, or the word."""
        if value == "auto":
            return "auto"
        number: float = click.FloatRange(0, 1).convert(value, param, ctx)
        return number


def check_threshold(threshold: float | Literal["auto"], kinds: set[str], track: bool) -> None:
    """Refuses `auto` where it would have no effect.

    Raises:
        click.UsageError: when nothing is drawn and nothing tracked.
    """
    if threshold == "auto" and not track and kinds.isdisjoint(THRESHOLDED):
        *names, last = THRESHOLDED
        raise click.UsageError(
            f"--threshold auto: nothing is drawn; add {', '.join(names)} or {last} to --save (the other "
            f"results hold all scores)"
        )


def thresholds_of(given: float | Literal["auto"], bundle: Path) -> Threshold:
    """Returns the thresholds that `--threshold` stands for.

    Args:
        given: the option's value.
        bundle: the bundle's folder.

    Raises:
        BundleError: when `auto` is given and the bundle has no thresholds, or cannot be opened.
    """
    if given != "auto":
        return given
    manifest = Bundle.open(bundle).manifest
    try:
        return manifest.score_thresholds()
    except BundleError as error:
        raise BundleError(f"--threshold auto: {error}") from error


def lowest(threshold: Threshold) -> float:
    """Returns the lowest threshold of any class, for what knows no classes."""
    return min(threshold) if isinstance(threshold, tuple) else threshold
