"""A sweep under way: settings scored and timed one after the other, and the choice among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from comask.errors import ComaskError, ConfigError, DataError, EngineError, one_line
from comask.progress import Progress
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions

if TYPE_CHECKING:
    from comask.bundle import Bundle, Manifest
    from comask.data.source import InstanceSource
    from comask.evaluate import CocoMetrics
    from comask.preprocess import Pixels


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is asked for.

    Attributes:
        bundle: to measure.
        backends: as `Predictor.load` takes them, the reference first; empty for all that run.
        device: to run on.
        runs: batches that are timed, of each setting.
        data: a folder, or `shapes`.
        limit: images that are scored; None for all.
        grid: assignments `name=a,b`.
        max_loss: AP points.
    """

    bundle: Path
    backends: tuple[str, ...]
    device: int | Literal["cpu"] | None
    runs: int
    data: str
    limit: int | None
    grid: tuple[str, ...]
    max_loss: float

    def options(self, setting: Setting, manifest: Manifest) -> LoadOptions:
        """A setting as a user of the bundle would say it: the bundle's own values are left out."""
        own = manifest.model.proposals, manifest.preprocess.short_side
        return LoadOptions(
            device=self.device,
            max_batch=setting.batch,
            proposals=None if setting.proposals == own[0] else setting.proposals,
            short_side=None if setting.short_side == own[1] else setting.short_side,
        )


class Work:
    """The sweep under way.

    Attributes:
        sweep: what is asked for.
        bundle: that is measured.
        asked: how many images were to be scored.
        scored: settings that are done, the bundle's own first.
        skipped: settings that cannot be run, and why.
    """

    def __init__(
        self, sweep: Sweep, bundle: Bundle, source: InstanceSource, indices: list[int]
    ) -> None:
        self.sweep, self.bundle, self.asked = sweep, bundle, len(indices)
        self.scored: list[Scored] = []
        self.skipped: list[tuple[Setting, str]] = []
        self._own_ms: float | None = None
        from comask.evaluate import Truth

        self._source = source
        self._truth = Truth(source, indices)

    @property
    def images(self) -> int:
        """How many images were scored, of which there are fewer where some cannot be decoded."""
        return len(self._truth.indices)

    @cached_property
    def _pictures(self) -> list[Pixels]:
        """Those that are timed: the first of what could be decoded when the first setting was scored."""
        return [self._source.image(index) for index in self._truth.indices[: self.sweep.runs]]

    def run(
        self, names: list[str], pairs: list[tuple[int, int]], batches: list[int]
    ) -> BaseException | None:
        """Goes through the grid, the bundle's own setting first; what interrupted it, or None."""
        manifest = self.bundle.manifest
        own = Setting(
            backend=names[0], proposals=manifest.model.proposals,
            short_side=manifest.preprocess.short_side, batch=1,
        )  # fmt: skip
        wanted = [
            Setting(backend=name, proposals=proposals, short_side=side, batch=1)
            for name in names
            for proposals, side in pairs
        ]
        order = list(dict.fromkeys([own, *wanted]))
        try:
            with self._open(own) as reference:
                for place, setting in enumerate(order):
                    tried = batches if setting in wanted else []
                    if setting == own:
                        tried = list(
                            dict.fromkeys([1, *tried])
                        )  # what the others are compared with
                    title = f"{place + 1}/{len(order)} {setting.without_batch}"
                    self._measure(setting, tried, reference, title)
        except (KeyboardInterrupt, SystemExit) as interruption:  # SIGINT, SIGTERM
            if not self.scored:
                raise
            return interruption
        return None

    def _open(self, setting: Setting) -> Predictor:
        options = self.sweep.options(setting, self.bundle.manifest)
        return Predictor.open(self.bundle.folder, setting.backend, options)

    def _measure(
        self, setting: Setting, batches: list[int], reference: Predictor, title: str
    ) -> None:
        """AP once, as it does not depend on the batch; then the time of each batch."""
        try:
            metrics = self._score(dataclasses.replace(setting, batch=max(batches)), f"{title}, AP")
            times = list(self._timed(setting, batches, reference, title))
        except (EngineError, ConfigError) as error:
            if not self.scored:
                raise
            self._skip(setting, error)
            return
        if not self.scored:
            _check_reference(metrics)
        box_ap, mask_ap = (100 * metrics.values[task]["AP"] for task in ("bbox", "segm"))
        own = self.scored[0] if self.scored else None
        loss = max(own.box_ap - box_ap, own.mask_ap - mask_ap) if own else 0.0
        self.scored += [
            Scored(setting=timed, box_ap=box_ap, mask_ap=mask_ap, loss=loss, ms_per_batch=ms)
            for timed, ms in times
        ]

    def _score(self, setting: Setting, title: str) -> CocoMetrics:
        from comask.runtime.parity.scores import labels_in_data, score_backend

        labels = labels_in_data(self.bundle.manifest, self._source)
        with self._open(setting) as predictor:
            most = self.bundle.manifest.model.detections
            scores = score_backend(predictor, self._truth, labels, most, title)
        self._truth = scores.truth
        return scores.final

    def _timed(
        self, setting: Setting, batches: list[int], reference: Predictor, title: str
    ) -> Iterator[tuple[Setting, float]]:
        """Each batch that runs, and its milliseconds.

        Other load comes and goes while a sweep takes its time. So each setting takes turns with the
        bundle's own, and its time is its share of the own one's first.
        """
        from comask.runtime.bench import timing

        single = timing.full_batches(self._pictures, reference.preprocess, 1)
        for batch in batches:
            timed = dataclasses.replace(setting, batch=batch)
            with self._open(timed) as predictor:
                try:
                    timing.check_batch(predictor, batch)
                except ComaskError as error:
                    self._skip(timed, error)
                    continue
                groups = timing.full_batches(self._pictures, predictor.preprocess, batch)
                with Progress(
                    f"{title}, timing batch {batch}", self.sweep.runs, unit="runs"
                ) as done:
                    found = timing.take_turns(
                        {"own": reference, "tried": predictor},
                        {"own": single, "tried": groups},
                        runs=self.sweep.runs,
                        advance=done.advance,
                    )
            if self._own_ms is None:  # the first is the own one itself
                self._own_ms = 1000 * found["own"].median
                yield timed, self._own_ms
            else:
                yield timed, self._own_ms * found["tried"].median / found["own"].median

    def _skip(self, setting: Setting, error: ComaskError) -> None:
        self.skipped.append((setting, one_line(error)))


def _check_reference(metrics: CocoMetrics) -> None:
    """Raises DataError where no loss could be seen."""
    if min(metrics.values[task]["AP"] for task in ("bbox", "segm")) < 0:
        raise DataError("the data holds no objects to score: --sweep needs images with objects")
    if not metrics.detections:
        raise DataError(
            "the bundle finds nothing in the data, so no setting could lose any AP: give data like "
            "that which it was trained for, or export with a lower --score-threshold"
        )
