"""A sweep's settings, scored: the Pareto front of AP loss against time, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run a bundle.

    Attributes:
        backend: as `Predictor.load` takes it.
        proposals: an image.
        short_side: of resized images, in pixels.
        batch: images that run together.
    """

    backend: str
    proposals: int
    short_side: int
    batch: int

    @property
    def without_batch(self) -> str:
        """All but the batch, which AP does not depend on."""
        return f"{self.backend}, {self.proposals} proposals, {self.short_side} px"

    def __str__(self) -> str:
        return f"{self.without_batch}, batch {self.batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A setting and what it is worth.

    Attributes:
        setting: that was run.
        box_ap: AP points, 100 × AP.
        mask_ap: likewise.
        loss: AP points that boxes or masks lose on the bundle's own setting, whichever lose more;
            below 0 where both gain.
        ms_per_batch: median milliseconds of a batch, from pixels to RLE.
    """

    setting: Setting
    box_ap: float
    mask_ap: float
    loss: float
    ms_per_batch: float

    @property
    def ms_per_image(self) -> float:
        """The batch's share of one image."""
        return self.ms_per_batch / self.setting.batch


def pareto_front(scored: Sequence[Scored]) -> list[Scored]:
    """Those that no other one beats: as fast with less loss, or with as little loss faster.

    Returns:
        the fastest first; of several that are equal in both, all.
    """
    front: list[Scored] = []
    for entry in sorted(scored, key=lambda s: (s.ms_per_image, s.loss)):
        last = front[-1] if front else None
        if last is None or entry.loss < last.loss or _values(entry) == _values(last):
            front.append(entry)
    return front


def choose(scored: Sequence[Scored], max_loss: float) -> Scored:
    """The fastest setting that loses at most `max_loss` points of box and of mask AP.

    Raises:
        ValueError: there is none; the bundle's own setting, which loses nothing, is always one.
    """
    return min(
        (entry for entry in scored if entry.loss <= max_loss),
        key=lambda s: (s.ms_per_image, s.loss),
    )


def _values(entry: Scored) -> tuple[float, float]:
    return entry.ms_per_image, entry.loss
