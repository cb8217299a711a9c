"""Settings with which a bundle can run, and grids of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from comask.bundle import Manifest
from comask.config import require_count
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.names import Device

PROPOSALS = (1.0, 1 / 2, 1 / 4, 1 / 8)  # fractions of the bundle's number
SHORT_SIDES = (0.8, 0.6)  # fractions of the bundle's short side, which itself comes first
BATCHES = (1, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run a bundle.

    Attributes:
        backend: a backend's name, see `Predictor.load`.
        proposals: the number of proposals per image.
        short_side: shorter side of the resized images in pixels.
        batch: the number of images that run together.
    """

    backend: str
    proposals: int
    short_side: int
    batch: int

    @property
    def without_batch(self) -> str:
        """The setting in words without the batch, on which AP does not depend."""
        return f"{self.backend}, {self.proposals} proposals, {self.short_side} px"

    def __str__(self) -> str:
        return f"{self.without_batch}, batch {self.batch}"

    def options(self, manifest: Manifest, device: Device) -> LoadOptions:
        """Returns the load options of the setting; the bundle's own values are left out."""
        own = own_setting(self.backend, manifest)
        return LoadOptions(
            device=device,
            max_batch=self.batch,
            proposals=None if self.proposals == own.proposals else self.proposals,
            short_side=None if self.short_side == own.short_side else self.short_side,
        )


def own_setting(backend: str, manifest: Manifest) -> Setting:
    """Returns the bundle's own setting with one image at a time."""
    return Setting(
        backend=backend, proposals=manifest.model.proposals,
        short_side=manifest.preprocess.short_side, batch=1,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grid:
    """The settings to try: every combination of these values.

    Attributes:
        proposals: numbers of proposals per image.
        short_sides: shorter sides of the resized images in pixels.
        batches: numbers of images that run together.
    """

    proposals: tuple[int, ...]
    short_sides: tuple[int, ...]
    batches: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest, given: Mapping[str, Sequence[int]]) -> Grid:
        """Returns a grid for a bundle.

        Short sides that are not given are multiples of the canvas's step, so that the network does not
        spend work on padding.

        Args:
            manifest: the bundle's manifest.
            given: values of `proposals`, `short-side` and `batch`; missing ones are derived from the
                bundle's.

        Raises:
            ConfigError: if the bundle cannot run with such proposals or short sides.
        """
        own, multiple = own_setting("", manifest), manifest.preprocess.pad_multiple
        sides = (round(part * own.short_side / multiple) * multiple for part in SHORT_SIDES)
        values: dict[str, Sequence[int]] = {
            "proposals": [max(1, round(part * own.proposals)) for part in PROPOSALS],
            "short-side": [own.short_side, *(max(multiple, side) for side in sides)],
            "batch": BATCHES,
            **given,
        }
        for count in values["proposals"]:
            require_count("--grid proposals", count, own.proposals)
        for length in values["short-side"]:
            manifest.preprocess.resized(length)  # raises
        return cls(*(tuple(dict.fromkeys(v)) for v in values.values()))

    def holds(self, setting: Setting) -> bool:
        """Returns whether the grid contains a setting, regardless of its backend."""
        return (
            setting.proposals in self.proposals
            and setting.short_side in self.short_sides
            and setting.batch in self.batches
        )

    def settings(self, backend: str) -> list[Setting]:
        """Returns all settings of a backend with a batch of 1."""
        return [
            Setting(backend=backend, proposals=proposals, short_side=side, batch=1)
            for side in self.short_sides
            for proposals in self.proposals
        ]
