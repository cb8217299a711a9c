"""`--threshold` of `comask infer`: the lowest score that is drawn, one for all or each class its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import click

from comask.bundle import Bundle
from comask.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from comask.structures import Detections

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
    if (
        threshold == "auto"
        and not track
        and not kinds & {"overlay", "page", "dataset", "labelstudio"}
    ):
        raise click.UsageError(
            "--threshold auto: nothing is drawn; add overlay, page, dataset or labelstudio to --save "
            "(the other results hold all scores)"
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


def drawn(found: Detections, threshold: Threshold) -> NDArray[Any]:
    """Returns [N] bool, whether each detection's score reaches the threshold of its class."""
    import numpy as np

    limits = np.array(threshold, np.float32)
    reached: NDArray[Any] = found.scores >= (limits[found.labels] if limits.ndim else limits)
    return reached
