"""Measures AP and time of a bundle over a grid of settings, and chooses the fastest good one."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from comask.bundle import Bundle
from comask.data.source import InstanceSource
from comask.errors import ComaskError, ConfigError, DataError, EngineError, one_line
from comask.evaluate import CocoMetrics, Truth
from comask.preprocess import Pixels
from comask.progress import Progress
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.names import Device
from comask.runtime.bench import timing
from comask.runtime.bench.grid import Grid, Setting, own_setting
from comask.runtime.bench.machine import Report, describe_machine
from comask.runtime.parity.scores import labels_in_data, score_backend
from comask.runtime.predictor import Predictor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Setting):
    """A setting with its AP and time.

    Attributes:
        box_ap: AP points of boxes, 100 × AP.
        mask_ap: AP points of masks.
        loss: the larger of the AP points that boxes and masks lose compared with the bundle's own
            setting; negative if both gain.
        ms_per_image: the batch's time divided by its images.
        ms_per_batch: median milliseconds per batch, from pixels to RLE.
    """

    box_ap: float
    mask_ap: float
    loss: float
    ms_per_image: float
    ms_per_batch: float


def pareto_front(scored: Sequence[Scored]) -> list[Scored]:
    """Returns the settings that no other one beats in time and loss.

    Returns:
        the settings, the fastest first; all of those that are equal in both.
    """
    front: list[Scored] = []
    for entry in sorted(scored, key=_time_and_loss):
        last = front[-1] if front else None
        if last is None or entry.loss < last.loss or _time_and_loss(entry) == _time_and_loss(last):
            front.append(entry)
    return front


def choose(scored: Sequence[Scored], max_loss: float) -> Scored:
    """Returns the fastest setting that loses at most `max_loss` points of box AP and of mask AP.

    Raises:
        ValueError: if no setting does. The bundle's own setting always does, since it loses nothing.
    """
    return min((entry for entry in scored if entry.loss <= max_loss), key=_time_and_loss)


def _time_and_loss(entry: Scored) -> tuple[float, float]:
    return entry.ms_per_image, entry.loss


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow(Scored):
    """A setting in a report.

    Attributes:
        ratio: the reference's milliseconds per image divided by this setting's.
        reference: whether it is the bundle's own setting.
        on_front: whether no other setting beats it.
        chosen: whether it is the fastest within the loss.
    """

    ratio: float
    reference: bool
    on_front: bool
    chosen: bool


@dataclass(frozen=True, slots=True)
class Skipped:
    """A setting in words, and the reason why it cannot run."""

    setting: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SweepReport(Report):
    """The measurements and the choice.

    Attributes:
        data: the value of `--data`.
        images: the number of images that were scored.
        not_decoded: the number of images that could not be decoded and were not scored.
        runs: the number of batches that were timed for each setting.
        max_loss: the AP points that may be lost.
        settings: all measured settings, the fastest first.
        skipped: settings that cannot run.
        finished: whether the whole grid was measured.
        verdict: the choice in one line.
        command: the `comask infer` command that runs the chosen setting.
        python: the Python expression that opens the chosen setting.
    """

    data: str
    images: int
    not_decoded: int
    runs: int
    max_loss: float
    settings: list[SweepRow]
    skipped: list[Skipped]
    finished: bool
    verdict: str
    command: str
    python: str


class Sweep:
    """Scores and times settings one after the other.

    Args:
        bundle: the bundle to measure.
        source: the data set.
        indices: indices of the images to score.
        device: the device to run on.
        runs: the number of batches to time for each setting.

    Attributes:
        scored: the settings that are done, the bundle's own first.
        skipped: the settings that cannot run.

    Raises:
        DataError: if the data has other classes than the bundle.
    """

    def __init__(
        self, bundle: Bundle, source: InstanceSource, indices: list[int], device: Device, runs: int
    ) -> None:
        self._labels = labels_in_data(bundle.manifest, source)
        self._bundle, self._source, self._device, self._runs = bundle, source, device, runs
        self._machine = describe_machine(device)  # before this process causes load
        self._asked = len(indices)
        self._truth = Truth(source, indices)
        self._own_ms: float | None = None
        self.scored: list[Scored] = []
        self.skipped: list[Skipped] = []

    @cached_property
    def _pixels(self) -> list[Pixels]:
        """The images to time: the first that could be decoded when the first setting was scored."""
        return [self._source.image(index) for index in self._truth.indices[: self._runs]]

    def run(self, backends: Sequence[str], grid: Grid) -> BaseException | None:
        """Measures the whole grid, beginning with the bundle's own setting on the first backend.

        Returns:
            the exception of SIGINT or SIGTERM that ended it early; None if it is complete.

        Raises:
            ComaskError: if the bundle's own setting cannot run or be scored.
        """
        own = own_setting(backends[0], self._bundle.manifest)
        wanted = [setting for name in backends for setting in grid.settings(name)]
        order = list(dict.fromkeys([own, *wanted]))
        try:
            with self._open(own) as reference:
                for place, setting in enumerate(order, 1):
                    batches = grid.batches if setting in wanted else ()
                    if setting == own:  # batch 1 is what all others are compared with
                        batches = tuple(dict.fromkeys([1, *batches]))
                    title = f"{place}/{len(order)} {setting.without_batch}"
                    self._measure(setting, batches, reference, title)
        except (KeyboardInterrupt, SystemExit) as interruption:  # SIGINT, SIGTERM
            if not self.scored:
                raise
            return interruption
        return None

    def report(self, data: str, max_loss: float, *, finished: bool) -> SweepReport:
        """Returns all measurements and the choice.

        Args:
            data: the scored data in words.
            max_loss: AP points that boxes and masks may lose.
            finished: whether the whole grid was measured.
        """
        reference, images = self.scored[0], len(self._truth.indices)
        chosen, front = choose(self.scored, max_loss), pareto_front(self.scored)
        options = chosen.options(self._bundle.manifest, self._device)
        command, python = usage(str(self._bundle.folder), chosen.backend, options)
        rows = [
            SweepRow(
                **dataclasses.asdict(entry), ratio=reference.ms_per_image / entry.ms_per_image,
                reference=entry is reference, on_front=entry in front, chosen=entry is chosen,
            )
            for entry in sorted(self.scored, key=lambda scored: scored.ms_per_image)
        ]  # fmt: skip
        return SweepReport(
            bundle=str(self._bundle.folder), machine=self._machine, data=data, images=images,
            not_decoded=self._asked - images, runs=self._runs, max_loss=max_loss, settings=rows,
            skipped=self.skipped, finished=finished, verdict=verdict(chosen, reference, max_loss),
            command=command, python=python,
        )  # fmt: skip

    def _open(self, setting: Setting) -> Predictor:
        options = setting.options(self._bundle.manifest, self._device)
        return Predictor.open(self._bundle.folder, setting.backend, options)

    def _measure(
        self, setting: Setting, batches: Sequence[int], reference: Predictor, title: str
    ) -> None:
        """Measures AP once, since it does not depend on the batch, and the time for each batch."""
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
            Scored(
                **dataclasses.asdict(timed), box_ap=box_ap, mask_ap=mask_ap, loss=loss,
                ms_per_image=ms / timed.batch, ms_per_batch=ms,
            )
            for timed, ms in times
        ]  # fmt: skip

    def _score(self, setting: Setting, title: str) -> CocoMetrics:
        with self._open(setting) as predictor:
            most = self._bundle.manifest.model.detections
            scores = score_backend(predictor, self._truth, self._labels, most, title)
        self._truth = scores.truth
        return scores.final

    def _timed(
        self, setting: Setting, batches: Sequence[int], reference: Predictor, title: str
    ) -> Iterator[tuple[Setting, float]]:
        """Yields the setting with each batch that runs, and its milliseconds.

        Other load comes and goes during a sweep. Each setting therefore takes turns with the bundle's own
        setting, and its time is the own setting's first time multiplied by the ratio of the two.
        """
        single = timing.full_batches(self._pixels, reference.preprocess, 1)
        for batch in batches:
            timed = dataclasses.replace(setting, batch=batch)
            with self._open(timed) as predictor:
                try:
                    timing.check_batch(predictor, batch)
                except ComaskError as error:
                    self._skip(timed, error)
                    continue
                groups = timing.full_batches(self._pixels, predictor.preprocess, batch)
                with Progress(f"{title}, timing batch {batch}", self._runs, unit="runs") as done:
                    measured = timing.take_turns(
                        {"own": reference, "tried": predictor},
                        {"own": single, "tried": groups},
                        runs=self._runs,
                        advance=done.advance,
                    )
            if self._own_ms is None:  # the first setting is the own one itself
                self._own_ms = 1000 * measured["own"].median
                yield timed, self._own_ms
            else:
                yield timed, self._own_ms * measured["tried"].median / measured["own"].median

    def _skip(self, setting: Setting, error: ComaskError) -> None:
        self.skipped.append(Skipped(str(setting), one_line(error)))


def _check_reference(metrics: CocoMetrics) -> None:
    """Raises DataError if the data or the bundle could not show a loss of AP."""
    if min(metrics.values[task]["AP"] for task in ("bbox", "segm")) < 0:
        raise DataError("the data has no objects to score: a sweep needs images with objects")
    if not metrics.detections:
        raise DataError(
            "the bundle finds nothing in the data, so no setting could lose any AP: give data like "
            "the training data, or export with a lower --score-threshold"
        )


def verdict(chosen: Scored, reference: Scored, max_loss: float) -> str:
    """Returns the choice in one line."""
    within = f"within {max_loss:g} AP points of {reference}"
    if chosen is reference:
        return f"fastest {within}: that setting itself"
    box, mask = chosen.box_ap - reference.box_ap, chosen.mask_ap - reference.mask_ap
    return (
        f"fastest {within}: {chosen}, {chosen.ms_per_image:.2f} ms per image, "
        f"{reference.ms_per_image / chosen.ms_per_image:.2f} times as fast, box AP {box:+.2f}, "
        f"mask AP {mask:+.2f}"
    )


def usage(bundle: str, backend: str, options: LoadOptions) -> tuple[str, str]:
    """Returns the `comask infer` command and the Python expression that run a setting."""
    names = {  # what a setting changes, and the command's options for it
        "device": "device", "max_batch": "batch", "proposals": "proposals", "short_side": "short-side",
    }  # fmt: skip
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    flags = "".join(f" --{names[name]} {value}" for name, value in given.items())
    keywords = "".join(f", {name}={value!r}" for name, value in given.items())
    return (
        f"comask infer {shlex.quote(bundle)} INPUT --output DIR --backend {backend}{flags}",
        f"Predictor.load({bundle!r}, {backend!r}{keywords})",
    )
