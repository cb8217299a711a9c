"""Settings to run a bundle with, and grids of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from comask.bundle import Manifest
from comask.config import require_count
from comask.runtime.backends import Device, LoadOptions

PROPOSALS = (1.0, 1 / 2, 1 / 4, 1 / 8)  # of the bundle's
SHORT_SIDES = (0.8, 0.6)  # of the bundle's, which comes first
BATCHES = (1, 4)


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

    def options(self, manifest: Manifest, device: Device) -> LoadOptions:
        """The setting as a user of the bundle would say it: the bundle's own values are left out."""
        own = own_setting(self.backend, manifest)
        return LoadOptions(
            device=device,
            max_batch=self.batch,
            proposals=None if self.proposals == own.proposals else self.proposals,
            short_side=None if self.short_side == own.short_side else self.short_side,
        )


def own_setting(backend: str, manifest: Manifest) -> Setting:
    """The bundle's own setting, one image at a time."""
    return Setting(
        backend=backend, proposals=manifest.model.proposals,
        short_side=manifest.preprocess.short_side, batch=1,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grid:
    """The settings to try: every combination of these values.

    Attributes:
        proposals: an image.
        short_sides: of resized images, in pixels.
        batches: images that run together.
    """

    proposals: tuple[int, ...]
    short_sides: tuple[int, ...]
    batches: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest, given: Mapping[str, Sequence[int]]) -> Grid:
        """A grid for a bundle.

        Short sides that are not given are multiples of the canvas's, so that none of the network's work
        is on padding.

        Args:
            manifest: of the bundle.
            given: values of `proposals`, `short-side` and `batch`. For those that are missing, parts of
                what the bundle has.

        Raises:
            ConfigError: the bundle has no such proposals or short side.
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
        """Whether a setting is of the grid, whatever its backend."""
        return (
            setting.proposals in self.proposals
            and setting.short_side in self.short_sides
            and setting.batch in self.batches
        )

    def settings(self, backend: str) -> list[Setting]:
        """All of them but for the batch, which is 1."""
        return [
            Setting(backend=backend, proposals=proposals, short_side=side, batch=1)
            for side in self.short_sides
            for proposals in self.proposals
        ]
