"""int8 graphs for a bundle: calibrated activations, and as many layers in int8 as an AP budget allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from comask.bundle import (
    INT8_BASE,
    STAGES,
    Bundle,
    extend,
    graph_file,
    scratch_folder,
    sha256,
    with_graphs,
)
from comask.calib.cache import CACHE
from comask.calib.options import Method, QuantizeOptions
from comask.calib.precision_search import Feeds, Search, costs, disturbances
from comask.calib.qdq import graph_layers, quantize_graph, readings
from comask.calib.ranges import collect_ranges
from comask.calib.sampling import choose_images
from comask.calib.validation import ENOUGH, Measured, Scorer, Validation
from comask.data.open_data import open_source
from comask.data.source import InstanceSource
from comask.errors import PrecisionError
from comask.preprocess import prepare
from comask.progress import Progress
from comask.runtime.backends.base import Stages
from comask.runtime.backends.ort import OrtSession, ort_stages

Report = Callable[[str], None]

# images of `shapes` that nothing else sees
CALIBRATION_SEED, VALIDATION_SEED = 4_000_000, 5_000_000
PROBED_IMAGES = 4  # of the calibration's, on which single layers are quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """Where the ranges of activations come from.

    Attributes:
        data: as the user named it.
        images: number of images.
        seed: of their choice.
        method: from histograms to ranges.
    """

    data: str
    images: int
    seed: int
    method: Method


@dataclass(frozen=True, slots=True)
class FloatLayer:
    """A layer that stays float, and the reason in words."""

    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class DisturbingLayer(FloatLayer):
    """A layer that the precision search keeps float.

    Attributes:
        disturbance: noise in the predictions when this layer alone is int8, as a share of their power.
        rank: 1 for the layer that disturbs most.
        cost_share: its share of the network's multiplications.
    """

    disturbance: float
    rank: int
    cost_share: float


@dataclass(frozen=True, slots=True)
class TrialReport:
    """One evaluation: how many layers were float, the AP points lost, and their standard error."""

    float_layers: int
    loss: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Report:
    """How int8 graphs were made and what they cost: the manifest's `verification.int8`.

    Attributes:
        calibration: where the ranges come from.
        base: precision of the graphs that were quantised.
        layers: number of layers that could be int8.
        float_layers: those that are not, the most disturbing first.
        budget: AP points that might be lost.
        data: that AP was measured on, as the user named it.
        images: number of images in it.
        reference: AP of `box` and `mask` of PyTorch in fp32, in points.
        ap: the same of the int8 graphs.
        loss: AP points lost and their standard error.
        trials: in their order.
        bytes: size of both graphs by precision.
        latency: seconds an image by precision; None until engines of both were timed on a GPU.
    """

    calibration: CalibrationReport
    base: str
    layers: int
    float_layers: list[FloatLayer]
    budget: float
    data: str
    images: int
    reference: dict[str, float]
    ap: dict[str, float]
    loss: tuple[float, float]
    trials: list[TrialReport]
    bytes: dict[str, int]
    latency: dict[str, float] | None = None


def quantize(
    bundle: Bundle, options: QuantizeOptions, val_data: str, report: Report
) -> tuple[Bundle, Int8Report]:
    """Calibrates on the images that the options name, and searches within the budget.

    Args:
        bundle: with fp32 and fp16 graphs.
        options: with `calib_data`.
        val_data: data set that AP is measured on, or `shapes`.
        report: takes a line before each step.

    Raises:
        PrecisionError: when the promise cannot be kept.
        DataError: when the data cannot be used.
    """
    assert options.calib_data is not None
    most = options.val_images
    source = open_source(val_data, "val", shapes_images=most, shapes_seed=VALIDATION_SEED)
    indices = np.random.default_rng(0).permutation(len(source))[:most]  # sorted data begin alike
    validation = Validation(
        source=source, indices=sorted(indices.tolist()), name=val_data, budget=options.ap_budget
    )
    if len(indices) < ENOUGH:
        report(
            f"warning: AP on {len(indices)} images says little of others, and its error is not known; "
            f"give {ENOUGH} --val-images or more"
        )
    scorer = Scorer(bundle, validation)  # before the calibration: it may refuse
    count, seed = options.calib_images, options.calib_seed
    data: InstanceSource | Path = Path(options.calib_data)
    if options.calib_data == "shapes":
        data = open_source("shapes", "train", shapes_images=4 * count, shapes_seed=CALIBRATION_SEED)
    images = choose_images(data, count, seed, report=report)
    calibration = collect_ranges(bundle, images, cache=bundle.folder / CACHE, report=report)
    return add_int8(
        bundle,
        calibration.ranges(options.calib_method),
        [image.decode() for image in images[:PROBED_IMAGES]],
        scorer,
        calibration=CalibrationReport(
            data=options.calib_data,
            images=len(calibration.images),
            seed=seed,
            method=options.calib_method,
        ),
        report=report,
    )


def add_int8(
    bundle: Bundle,
    largest: Mapping[str, float],
    images: Sequence[NDArray[np.uint8]],
    scorer: Scorer,
    *,
    calibration: CalibrationReport,
    report: Report = lambda line: None,
) -> tuple[Bundle, Int8Report]:
    """Adds int8 graphs to a bundle that keep its AP, or changes nothing.

    Args:
        bundle: with fp32 and fp16 graphs.
        largest: of each activation of both stages, see `quantize_graph`.
        images: a few of the calibration's, u8 [h, w, 3] RGB, on which single layers are quantised.
        scorer: of the bundle, with the budget.
        calibration: how `largest` came about, for the manifest.
        report: takes a line before each step.

    Raises:
        PrecisionError: when the budget cannot be met, or nothing gets smaller.
    """
    validation = scorer.validation
    with scratch_folder(bundle.folder, bundle.folder) as folder:
        candidate = _Candidate(bundle, folder, largest, images, scorer, report)
        search = Search(candidate.loss, validation.budget)
        float_layers, reasons = frozenset[str](), list[FloatLayer]()
        if not search.try_all_int8():
            report("too much is lost: which layers matter?")
            noise, price = candidate.probe()
            float_layers = search.run(noise, price)
            reasons = _reasons(float_layers, noise, price)
        reasons += candidate.without_range
        candidate.write(float_layers)
        files = {graph_file(stage, "int8"): folder / graph_file(stage, "int8") for stage in STAGES}
        sizes = {p: candidate.size(p) for p in ("fp32", INT8_BASE, "int8")}
        if sizes["int8"] >= sizes[INT8_BASE]:
            raise PrecisionError(
                f"nothing gets smaller: so many layers must stay float that the int8 graphs have "
                f"{sizes['int8']} bytes, the fp16 ones {sizes[INT8_BASE]}; use fp16"
            )
        made = Int8Report(
            calibration=calibration,
            base=INT8_BASE,
            layers=len(candidate.layers) + len(candidate.without_range),
            float_layers=reasons,
            budget=validation.budget,
            data=validation.name,
            images=len(validation.indices),
            reference=scorer.reference.ap,
            ap=candidate.measured[float_layers].ap,
            loss=candidate.losses[float_layers],
            trials=[
                TrialReport(len(tried), loss, error)
                for tried, (loss, error) in candidate.losses.items()
            ],
            bytes=sizes,
        )
        digests = {name: sha256(path) for name, path in files.items()}
        verification = {"int8": dataclasses.asdict(made)}
        return extend(bundle, folder, lambda now: with_graphs(now, digests, verification)), made


class _Candidate:
    """int8 graphs in the making.

    Args:
        bundle: see `add_int8`.
        folder: where the graphs are written.
        largest: see `add_int8`.
        images: see `add_int8`.
        scorer: see `add_int8`.
        report: see `add_int8`.

    Attributes:
        layers: stage by layer, of those that may become int8.
        without_range: the others, for the manifest.
        measured: AP of each set of float layers that was tried.
        losses: what that is below PyTorch's, and the standard error.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        largest: Mapping[str, float],
        images: Sequence[NDArray[np.uint8]],
        scorer: Scorer,
        report: Report,
    ) -> None:
        self._bundle, self._folder, self._largest, self._images = bundle, folder, largest, images
        self._scorer, self._report = scorer, report
        self._graphs = {stage: onnx.load(bundle.graph(stage, INT8_BASE)) for stage in STAGES}
        self.layers = {
            layer.name: stage for stage, graph in self._graphs.items() for layer in graph_layers(graph)
        }  # fmt: skip
        unknown = {
            reading.layer
            for graph in self._graphs.values()
            for reading in readings(graph)
            if reading.name not in largest
        }
        self.without_range = [
            FloatLayer(name, "in the images of the calibration nothing came through it")
            for name in sorted(unknown)
        ]
        for name in unknown:
            del self.layers[name]
        self.measured: dict[frozenset[str], Measured] = {}
        self.losses: dict[frozenset[str], tuple[float, float]] = {}

    def write(self, float_layers: frozenset[str]) -> None:
        """The graphs in which these layers stay float."""
        layers = self.layers.keys() - float_layers
        for stage, graph in self._graphs.items():
            quantized = quantize_graph(graph, self._largest, layers)
            onnx.save(quantized, self._folder / graph_file(stage, "int8"))

    def loss(self, float_layers: frozenset[str]) -> float:
        """See `Search`."""
        self.write(float_layers)
        stage1, stage2 = (
            OrtSession(self._folder / graph_file(stage, "int8"), "cpu", optimized=False)
            for stage in STAGES
        )
        found = self._scorer.measure(Stages("onnxruntime:int8", stage1, stage2))
        loss, error = self._scorer.reference.loss_of(found)
        self.measured[float_layers], self.losses[float_layers] = found, (loss, error)
        self._report(
            f"{len(float_layers)} of {len(self.layers)} layers float: box AP {found.ap['box']:.2f}, "
            f"mask AP {found.ap['mask']:.2f}, {loss:+.2f} ± {error:.2f} points lost"
        )
        return loss + error  # or luck on these images would be the promise for others

    def probe(self) -> tuple[dict[str, float], dict[str, float]]:
        """How much each layer disturbs the predictions, and what it costs."""
        noise: dict[str, float] = {}
        price: dict[str, float] = {}
        with Progress("quantising each layer alone", len(self.layers), unit="layers") as progress:
            for stage, images in zip(STAGES, zip(*self._inputs(), strict=True), strict=True):
                names = [name for name, place in self.layers.items() if place == stage]
                graph = onnx.load(self._bundle.graph(stage, "fp32"))
                noise |= disturbances(graph, self._largest, names, images, progress.advance)
                price |= costs(graph, images[0])
        return noise, price

    def _inputs(self) -> Iterator[tuple[Feeds, Feeds]]:
        """Those of both fp32 graphs, for each image."""
        with ort_stages(self._bundle, "fp32", "cpu") as stages:
            for pixels in self._images:
                image = prepare(pixels, self._bundle.manifest.preprocess)
                sizes = np.array([image.size], np.int32)
                first: Feeds = {"images": image.canvas[None], "image_sizes": sizes}
                yield first, {**stages.stage1.run(first), "image_sizes": sizes}

    def size(self, precision: str) -> int:
        """Bytes of both graphs."""
        folder = self._folder if precision == "int8" else self._bundle.folder
        return sum((folder / graph_file(stage, precision)).stat().st_size for stage in STAGES)


def _reasons(
    float_layers: frozenset[str], noise: Mapping[str, float], price: Mapping[str, float]
) -> list[FloatLayer]:
    """Which layers stay float and why, the most disturbing first."""
    ranks = {name: rank for rank, name in enumerate(sorted(noise, key=lambda n: -noise[n]), 1)}
    total = sum(price.values())
    return [
        DisturbingLayer(
            layer=name,
            reason=f"int8 in this layer alone puts {100 * noise[name]:.2g} % noise into the "
            f"predictions, the {ranks[name]}. most of {len(noise)} layers",
            disturbance=noise[name],
            rank=ranks[name],
            cost_share=price[name] / total,
        )
        for name in sorted(float_layers, key=ranks.__getitem__)
    ]
