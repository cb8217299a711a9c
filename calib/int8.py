"""int8 graphs for a bundle: calibrated activations, and as many layers in int8 as an AP budget allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from comask.bundle import (
    INT8_BASE,
    STAGES,
    Bundle,
    Manifest,
    extend,
    graph_file,
    scratch_folder,
    sha256,
)
from comask.calib.predictions import Feeds
from comask.calib.qdq import graph_layers, quantize_graph, readings
from comask.calib.search import Search, costs, disturbances
from comask.calib.validation import Measured, Scorer
from comask.errors import PrecisionError
from comask.preprocess import prepare
from comask.runtime.ort_session import OrtSession, ort_stages
from comask.runtime.session import Stages

Report = Callable[[str], None]


def add_int8(
    bundle: Bundle,
    largest: Mapping[str, float],
    images: Sequence[NDArray[np.uint8]],
    scorer: Scorer,
    *,
    calibration: Mapping[str, Any],
    report: Report = lambda line: None,
) -> Bundle:
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
        float_layers, reasons = frozenset[str](), list[dict[str, Any]]()
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
        proof = {
            "calibration": dict(calibration),
            "base": INT8_BASE,
            "layers": len(candidate.layers) + len(candidate.without_range),
            "float_layers": reasons,
            "budget": validation.budget,
            "data": validation.name,
            "images": len(validation.indices),
            "reference": scorer.reference.ap,
            "ap": candidate.measured[float_layers].ap,
            "loss": candidate.losses[float_layers],
            "trials": [
                {"float_layers": len(tried), "loss": loss, "error": error}
                for tried, (loss, error) in candidate.losses.items()
            ],
            "bytes": sizes,
            "latency": None,  # known where GPU engines were timed
        }
        made = {name: sha256(path) for name, path in files.items()}
        return extend(bundle, folder, lambda manifest: _with_int8(manifest, made, proof))


def _with_int8(manifest: Manifest, files: dict[str, str], proof: dict[str, Any]) -> Manifest:
    precisions = (name for name in manifest.precisions if name != "int8")
    return dataclasses.replace(
        manifest,
        precisions=(*precisions, "int8"),
        files=manifest.files | files,
        verification=manifest.verification | {"int8": proof},
    )


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
            {"layer": name, "reason": "in the images of the calibration nothing came through it"}
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
        from comask.progress import Progress

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
) -> list[dict[str, Any]]:
    """Which layers stay float and why, the most disturbing first."""
    ranks = {name: rank for rank, name in enumerate(sorted(noise, key=lambda n: -noise[n]), 1)}
    total = sum(price.values())
    return [
        {
            "layer": name,
            "disturbance": noise[name],
            "rank": ranks[name],
            "cost_share": price[name] / total,
            "reason": f"int8 in this layer alone puts {100 * noise[name]:.2g} % noise into the "
            f"predictions, the {ranks[name]}. most of {len(noise)} layers",
        }
        for name in sorted(float_layers, key=ranks.__getitem__)
    ]
