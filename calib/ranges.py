"""The ranges of a bundle's activations, collected one image at a time by ONNX Runtime on the CPU.

Padding does not count: rows of proposals and detections that hold none go through the layers too, and
where there are few detections they would be most of what the head is calibrated with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from comask.bundle import Bundle
from comask.calib.cache import Calibration
from comask.calib.histograms import Histogram
from comask.calib.qdq import activations
from comask.calib.sampling import CalibrationImage
from comask.errors import CalibrationError
from comask.preprocess import prepare
from comask.progress import Progress

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[Any]

WANTED_AT_ONCE = 8  # wanted tensors a piece: fewer save little memory and cost sessions

POOLING, ROIS = "PyramidRoiAlign", 4  # the operator, and the place of its RoIs [B, R, 4]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive nodes.

    Attributes:
        session: that runs them.
        inputs: tensors that they read from earlier pieces.
        outputs: tensors that are wanted or that later pieces read.
        done: tensors that no later piece reads.
    """

    session: onnxruntime.InferenceSession
    inputs: list[str]
    outputs: list[str]
    done: set[str]


class Pieces:
    """A graph in ONNX Runtime on the CPU that gives any tensors, each as soon as it is there.

    Extra outputs of the whole graph would all be in memory at its end; a piece's are freed when they
    have been looked at and no later piece needs them. The graph runs once all the same.

    Args:
        model: of which the nodes are in topological order, and every tensor's type is known.
        wanted: names of tensors, inputs and outputs of the graph among them.
    """

    def __init__(self, model: onnx.ModelProto, wanted: Iterable[str]) -> None:
        graph = model.graph
        self._wanted = set(wanted)
        known = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
        weights = {weight.name: weight for weight in graph.initializer}
        self._pieces: list[Piece] = []
        parts = _parts(graph.node, self._wanted)
        later: set[str] = set()  # what the pieces behind read; from the last piece to the first
        for nodes in reversed(parts):
            produced = [name for node in nodes for name in node.output if name]
            read = dict.fromkeys(name for node in nodes for name in node.input if name)
            inputs = [name for name in read if name not in weights and name not in produced]
            outputs = [name for name in produced if name in self._wanted or name in later]
            piece = onnx.helper.make_model(
                onnx.helper.make_graph(
                    nodes,
                    "piece",
                    [known[name] for name in inputs],
                    [known[name] for name in outputs],
                    [weights[name] for name in read if name in weights],
                ),
                opset_imports=model.opset_import,
                functions=model.functions,
                ir_version=model.ir_version,
            )
            done = {name for name in (*inputs, *outputs) if name not in later}
            self._pieces.append(Piece(_session(piece), inputs, outputs, done))
            later.update(inputs)
        self._pieces.reverse()

    def run(self, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        """The wanted tensors by name, inputs first, then in the order in which they are computed."""
        held = dict(feeds)
        yield from ((name, value) for name, value in feeds.items() if name in self._wanted)
        for piece in self._pieces:
            values = piece.session.run(piece.outputs, {name: held[name] for name in piece.inputs})
            held.update(zip(piece.outputs, values, strict=True))
            del values
            for name in piece.outputs:
                if name in self._wanted:
                    yield name, held[name]
            for name in piece.done:
                held.pop(name, None)


def _parts(nodes: Iterable[onnx.NodeProto], wanted: set[str]) -> list[list[onnx.NodeProto]]:
    """The nodes in parts that each produce up to `WANTED_AT_ONCE` of the tensors."""
    parts: list[list[onnx.NodeProto]] = [[]]
    count = 0
    for node in nodes:
        produced = len(wanted.intersection(node.output))
        if count and count + produced > WANTED_AT_ONCE:
            parts.append([])
            count = 0
        parts[-1].append(node)
        count += produced
    return parts


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; they are raised as well
    options.enable_cpu_mem_arena = False  # it would keep what was freed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # of idle pieces
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def collect_ranges(
    bundle: Bundle,
    images: Iterable[CalibrationImage],
    *,
    cache: Path | None,
    report: Callable[[str], None],
) -> Calibration:
    """Histograms of what the bundle's int8 layers read, over `images` and no others.

    With comask-r50 at 800×1344 it takes 2.6 GB, and 11 s of one core's time an image.

    Args:
        bundle: its fp32 graphs are run.
        images: those that the cache has seen are not run again.
        cache: a file that is written after every image, and read where it exists and holds some of
            these images alone; None for none.
        report: is told, line by line, what the cache gave and what got no range.

    Raises:
        BundleError: when a graph is missing or altered.
        CalibrationError: when there are no images, the cache is not of this bundle, or an activation is
            not finite.
    """
    named = {image.sha256: image for image in images}
    if not named:
        raise CalibrationError("no images to calibrate with; name some")
    calibration = Calibration.empty(bundle)
    if cache is not None and cache.exists():
        found = Calibration.load(cache)
        found.require(bundle, cache)
        if others := len(found.images.keys() - named.keys()):
            report(f"{cache}: has {others} images that were not chosen now; it is made anew")
        else:
            calibration = found
            report(f"{cache}: has {len(found.images)} of {len(named)} images")
    missing = [image for sha256, image in named.items() if sha256 not in calibration.images]
    done = len(named) - len(missing)
    if missing:
        _collect(bundle, missing, calibration, cache, done)
    empty = [key for key, histogram in calibration.histograms.items() if not histogram.total]
    if empty:
        report(
            f"calibration: nothing was detected in these images, so {len(empty)} activations have no "
            f"range ({empty[0]}, …); calibrate with images of what the network detects"
        )
    return calibration


def _collect(
    bundle: Bundle,
    images: list[CalibrationImage],
    calibration: Calibration,
    cache: Path | None,
    done: int,
) -> None:
    """Adds images to a calibration, and saves it after each."""
    stage1, stage2 = (_Observed(bundle.graph(stage, "fp32")) for stage in ("stage1", "stage2"))
    total = done + len(images)
    with Progress("calibrating", total, unit="images", done=done) as progress:
        for image in images:
            prepared = prepare(image.decode(), bundle.manifest.preprocess)
            feeds: dict[str, Array] = {
                "images": prepared.canvas[None],
                "image_sizes": np.array([prepared.size], np.int32),
            }
            found: dict[str, Histogram] = {}
            try:
                pyramid = stage1.run(feeds, found)
                stage2.run({**pyramid, "image_sizes": feeds["image_sizes"]}, found)
            except CalibrationError as error:
                raise CalibrationError(f"{image.name}: {error}") from error
            for key, histogram in found.items():
                before = calibration.histograms.get(key)
                calibration.histograms[key] = before + histogram if before else histogram
            calibration.images[image.sha256] = image.name
            if cache is not None:
                calibration.save(cache)
            progress.advance()


class _Observed:
    """A stage's fp32 graph whose activations are looked at as it runs."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        self._keys: dict[str, list[str]] = {}  # of each tensor
        for key, tensor in activations(model).items():
            self._keys.setdefault(tensor, []).append(key)
        self._rois = {node.input[ROIS] for node in model.graph.node if node.op_type == POOLING}
        self._outputs = {value.name for value in model.graph.output}
        self._pieces = Pieces(model, {*self._keys, *self._rois, *self._outputs})

    def run(self, feeds: Mapping[str, Array], found: dict[str, Histogram]) -> dict[str, Array]:
        """The graph's outputs; puts the histogram of each activation into `found`.

        Raises:
            CalibrationError: when an activation is not finite.
        """
        outputs = {}
        # Of the RoIs pooled last: padding's boxes are zeros. What layers read comes from these.
        occupied = None
        for name, value in self._pieces.run(feeds):
            if name in self._outputs:
                outputs[name] = value
            if name in self._rois:
                occupied = value.reshape(-1, 4).any(1)
            if name not in self._keys:
                continue
            keys = self._keys[name]
            try:
                histogram = Histogram.of(value if occupied is None else value[occupied])
            except FloatingPointError as error:
                raise CalibrationError(
                    f"the input of {keys[0]} holds {error}; a network whose fp32 activations are not "
                    f"finite cannot be calibrated: check its weights"
                ) from error
            found.update(dict.fromkeys(keys, histogram))
        return outputs
