"""Adds int8 graphs to a bundle, with calibrated activations and as few float layers as possible."""

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
from comask.calib.speed import measure_on_cpu, require_faster
from comask.calib.validation import ENOUGH, Measured, Scorer, Validation
from comask.data.open_data import open_source
from comask.data.source import InstanceSource
from comask.errors import PrecisionError
from comask.preprocess import prepare
from comask.progress import Progress
from comask.runtime.backends.base import Stages
from comask.runtime.backends.ort import OrtSession, ort_stages
from comask.runtime.backends.ort_install import import_onnxruntime
from comask.runtime.bench.machine import processor

Report = Callable[[str], None]

# Seeds of generated `shapes` images that are used nowhere else.
CALIBRATION_SEED, VALIDATION_SEED = 4_000_000, 5_000_000
PROBED_IMAGES = 4  # calibration images on which each layer is quantised alone


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """Describes where the ranges of activations come from.

    Attributes:
        data: the data as the user named it.
        images: the number of images.
        seed: the seed by which they were chosen.
        method: the method that turns histograms into ranges.
    """

    data: str
    images: int
    seed: int
    method: Method


@dataclass(frozen=True, slots=True)
class FloatLayer:
    """A layer that stays float, with the reason in words."""

    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class DisturbingLayer(FloatLayer):
    """A layer that the precision search keeps float.

    Attributes:
        disturbance: noise in the predictions when this layer alone is int8, as a share of their power.
        rank: the layer's rank by disturbance; 1 for the layer that disturbs most.
        cost_share: the layer's share of the network's multiplications.
    """

    disturbance: float
    rank: int
    cost_share: float


@dataclass(frozen=True, slots=True)
class TrialReport:
    """One evaluation: the number of float layers, the AP points lost, and their standard error."""

    float_layers: int
    loss: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Report:
    """Describes how int8 graphs were made and what they cost: the manifest's `verification.int8`.

    Attributes:
        calibration: where the ranges come from.
        base: the precision of the graphs that were quantised.
        layers: the number of layers that could be int8.
        float_layers: the layers that stay float, the most disturbing first.
        budget: the AP points that int8 was allowed to lose.
        data: the data that AP was measured on, as the user named it.
        images: the number of images that AP was measured on.
        reference: AP of `box` and `mask` of PyTorch in fp32, in points.
        ap: AP of `box` and `mask` of the int8 graphs, in points.
        loss: the AP points lost, and their standard error.
        trials: all evaluations, in their order.
        bytes: the size of both graphs, by precision.
        latency: seconds per image, by precision; None until engines of both were timed on a GPU.
        cpu_latency: seconds per image on OpenVINO, by precision; None if that was not measured.
        processor: the processor's name, with `cpu_latency`.
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
    cpu_latency: dict[str, float] | None = None
    processor: str | None = None


def quantize(
    bundle: Bundle, options: QuantizeOptions, val_data: str, report: Report
) -> tuple[Bundle, Int8Report]:
    """Adds int8 graphs, calibrated on the images of the options, that lose at most `max_loss` points.

    Args:
        bundle: a bundle with fp32 and fp16 graphs.
        options: the options of `comask quantize`.
        val_data: the data set that AP is measured on, or `shapes`.
        report: called with a line before each step.

    Raises:
        BackendUnavailableError: ONNX Runtime, which runs the graphs, is not installed.
        PrecisionError: no int8 graphs lose so little, or they are not smaller.
        DataError: the data cannot be used.
    """
    import_onnxruntime()  # before PyTorch's AP is measured
    most = options.limit
    source = open_source(val_data, "val", shapes_images=most, shapes_seed=VALIDATION_SEED)
    # A random choice, since neighbours in sorted data resemble each other.
    indices = np.random.default_rng(0).permutation(len(source))[:most]
    validation = Validation(
        source=source, indices=sorted(indices.tolist()), name=val_data, budget=options.max_loss
    )
    if len(indices) < ENOUGH:
        report(
            f"warning: {len(indices)} images are too few to measure AP and its error reliably; use at "
            f"least {ENOUGH}: give more --data, or a larger --limit"
        )
    scorer = Scorer(bundle, validation)  # Before the calibration, since it may refuse the data.
    count, seed = options.calib_limit, options.calib_seed
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
        on_cpu=not options.skip_cpu,
        report=report,
    )


def add_int8(
    bundle: Bundle,
    largest: Mapping[str, float],
    images: Sequence[NDArray[np.uint8]],
    scorer: Scorer,
    *,
    calibration: CalibrationReport,
    on_cpu: bool = False,
    report: Report = lambda line: None,
) -> tuple[Bundle, Int8Report]:
    """Adds int8 graphs within the AP budget to a bundle; without success, the bundle stays unchanged.

    Args:
        bundle: a bundle with fp32 and fp16 graphs.
        largest: the largest magnitude of each activation of both stages, see `quantize_graph`.
        images: a few calibration images, u8 [h, w, 3] RGB, on which each layer is quantised alone.
        scorer: measures AP, and knows the budget.
        calibration: the origin of `largest`, for the manifest.
        on_cpu: whether int8 must be faster than other precisions on this processor, if OpenVINO is
            installed.
        report: called with a line before each step.

    Raises:
        PrecisionError: the budget cannot be met, or the int8 graphs are not smaller, or not faster.
    """
    validation = scorer.validation
    with scratch_folder(bundle.folder, bundle.folder) as folder:
        candidate = _Candidate(bundle, folder, largest, images, scorer, report)
        seconds = None
        if on_cpu:  # before the search, since more float layers only take longer
            candidate.write(frozenset())
            seconds = candidate.time_on_cpu()
        search = Search(candidate.loss, validation.budget)
        float_layers, reasons = frozenset[str](), list[FloatLayer]()
        if not search.try_all_int8():
            report("all layers in int8 lose too much: measuring which layers matter")
            noise, price = candidate.probe()
            float_layers = search.run(noise, price)
            reasons = _reasons(float_layers, noise, price)
        reasons += candidate.without_range
        candidate.write(float_layers)
        files = {graph_file(stage, "int8"): folder / graph_file(stage, "int8") for stage in STAGES}
        if on_cpu and float_layers:
            seconds = candidate.time_on_cpu()
        sizes = {p: candidate.size(p) for p in ("fp32", INT8_BASE, "int8")}
        if sizes["int8"] >= sizes[INT8_BASE]:
            raise PrecisionError(
                f"int8 saves no space: so many layers must stay float that the int8 graphs have "
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
            cpu_latency=seconds,
            processor=processor() if seconds else None,
        )
        digests = {name: sha256(path) for name, path in files.items()}
        verification = {"int8": dataclasses.asdict(made)}
        return extend(bundle, folder, lambda now: with_graphs(now, digests, verification)), made


class _Candidate:
    """Writes and measures int8 graphs with different sets of float layers.

    The arguments are those of `add_int8`, and `folder`, to which the graphs are written.

    Attributes:
        layers: the stage of each layer that may become int8.
        without_range: the layers that cannot, for the manifest.
        measured: the AP of each set of float layers that was tried.
        losses: the AP points that each set loses to PyTorch, and their standard error.
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
            FloatLayer(name, "no calibration image passed values through it")
            for name in sorted(unknown)
        ]
        for name in unknown:
            del self.layers[name]
        self.measured: dict[frozenset[str], Measured] = {}
        self.losses: dict[frozenset[str], tuple[float, float]] = {}

    def write(self, float_layers: frozenset[str]) -> None:
        """Writes the graphs in which these layers stay float."""
        layers = self.layers.keys() - float_layers
        for stage, graph in self._graphs.items():
            quantized = quantize_graph(graph, self._largest, layers)
            onnx.save(quantized, self._folder / graph_file(stage, "int8"))

    def loss(self, float_layers: frozenset[str]) -> float:
        """Returns the AP points that these float layers lose, plus the standard error.

        Without the error, luck on these images could pass for accuracy.
        """
        self.write(float_layers)
        stage1, stage2 = (
            OrtSession(self._folder / graph_file(stage, "int8"), "cpu", optimized=False)
            for stage in STAGES
        )
        measured = self._scorer.measure(Stages("onnxruntime:int8", stage1, stage2))
        loss, error = self._scorer.reference.loss_of(measured)
        self.measured[float_layers], self.losses[float_layers] = measured, (loss, error)
        self._report(
            f"{len(float_layers)} of {len(self.layers)} layers float: box AP {measured.ap['box']:.2f}, "
            f"mask AP {measured.ap['mask']:.2f}, {loss:+.2f} ± {error:.2f} points lost"
        )
        return loss + error

    def probe(self) -> tuple[dict[str, float], dict[str, float]]:
        """Returns each layer's disturbance of the predictions, and each layer's multiplications."""
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
        """Yields the inputs of both fp32 graphs for each image."""
        with ort_stages(self._bundle, "fp32", "cpu") as stages:
            for pixels in self._images:
                image = prepare(pixels, self._bundle.manifest.preprocess)
                sizes = np.array([image.size], np.int32)
                first: Feeds = {"images": image.canvas[None], "image_sizes": sizes}
                yield first, {**stages.stage1.run(first), "image_sizes": sizes}

    def time_on_cpu(self) -> dict[str, float] | None:
        """Times the graphs that were written last, see `measure_on_cpu`.

        Raises:
            PrecisionError: int8 is not faster than another precision.
        """
        graphs = {stage: self._folder / graph_file(stage, "int8") for stage in STAGES}
        seconds = measure_on_cpu(self._bundle, graphs, self._images)
        if seconds is None:
            self._report("int8 is not timed on this processor: pip install 'comask[openvino]'")
            return None
        times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in sorted(seconds.items()))
        self._report(f"per image on OpenVINO: {times}")
        remedy = "no int8 graphs were added; --skip-cpu adds them for a GPU"
        require_faster(seconds, "this processor", remedy)
        return seconds

    def size(self, precision: str) -> int:
        """Returns the size of both graphs in bytes."""
        folder = self._folder if precision == "int8" else self._bundle.folder
        return sum((folder / graph_file(stage, precision)).stat().st_size for stage in STAGES)


def _reasons(
    float_layers: frozenset[str], noise: Mapping[str, float], price: Mapping[str, float]
) -> list[FloatLayer]:
    """Returns the layers that stay float with their reasons, the most disturbing first."""
    ranks = {name: rank for rank, name in enumerate(sorted(noise, key=lambda n: -noise[n]), 1)}
    total = sum(price.values())
    return [
        DisturbingLayer(
            layer=name,
            reason=f"int8 in this layer alone adds {100 * noise[name]:.2g} % noise to the predictions "
            f"(rank {ranks[name]} of {len(noise)} layers)",
            disturbance=noise[name],
            rank=ranks[name],
            cost_share=price[name] / total,
        )
        for name in sorted(float_layers, key=ranks.__getitem__)
    ]
