"""Collects the ranges of a bundle's activations, one image at a time, in ONNX Runtime on the CPU.

Padding rows of proposals and detections pass through the layers, too, but they are not counted: for an
image with few detections, most of the head's input is padding.
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

WANTED_AT_ONCE = 8  # wanted tensors per piece; fewer would save little memory

POOLING, ROIS = "PyramidRoiAlign", 4  # the operator, and the index of its RoIs [B, R, 4]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive nodes of a graph, with the session that runs them.

    Attributes:
        session: the session that runs the nodes.
        inputs: the tensors that they read from earlier pieces.
        outputs: their tensors that are wanted, or that later pieces read.
        done: the tensors that no later piece reads.
    """

    session: onnxruntime.InferenceSession
    inputs: list[str]
    outputs: list[str]
    done: set[str]


class Pieces:
    """Runs a graph in ONNX Runtime on the CPU, and yields any of its tensors as they are computed.

    As extra outputs of the whole graph, all tensors would be in memory at its end. A piece's tensors are
    freed once they were yielded and no later piece reads them. Each node still runs only once.

    Args:
        model: the graph, with nodes in topological order and the type of every tensor.
        wanted: the names of tensors, including inputs and outputs of the graph.
    """

    def __init__(self, model: onnx.ModelProto, wanted: Iterable[str]) -> None:
        graph = model.graph
        self._wanted = set(wanted)
        known = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
        weights = {weight.name: weight for weight in graph.initializer}
        self._pieces: list[Piece] = []
        parts = _parts(graph.node, self._wanted)
        later: set[str] = set()  # tensors that later pieces read; the loop starts at the last piece
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
        """Yields the wanted tensors with their names: inputs first, then in the order of computation."""
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
    """Splits the nodes into parts that each produce up to `WANTED_AT_ONCE` of the tensors."""
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
    options.log_severity_level = 3  # Errors only; they are raised as well.
    options.enable_cpu_mem_arena = False  # An arena would keep freed memory.
    # Threads of idle pieces must not spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
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
    """Returns histograms of the activations that the bundle's int8 layers read, over `images` only.

    For comask-r50 at 800×1344, it takes 2.6 GB, and 11 s of one core's time per image.

    Args:
        bundle: the bundle, whose fp32 graphs are run.
        images: the images; those in the cache are not run again.
        cache: a file that is written after every image. It is read if it exists and holds no images
            other than these. None for no cache.
        report: called with lines about the cache, and about activations without a range.

    Raises:
        BundleError: a graph is missing or altered.
        CalibrationError: `images` is empty, the cache belongs to another bundle, or an activation is
            not finite.
    """
    named = {image.sha256: image for image in images}
    if not named:
        raise CalibrationError("no images to calibrate with; give --calib-data with images")
    calibration = Calibration.empty(bundle)
    if cache is not None and cache.exists():
        cached = Calibration.load(cache)
        cached.require(bundle, cache)
        if others := len(cached.images.keys() - named.keys()):
            report(
                f"{cache}: replaced, since {others} of its images are not among those chosen now"
            )
        else:
            calibration = cached
            report(f"{cache}: has {len(cached.images)} of {len(named)} images")
    missing = [image for sha256, image in named.items() if sha256 not in calibration.images]
    done = len(named) - len(missing)
    if missing:
        _collect(bundle, missing, calibration, cache, done)
    empty = [key for key, histogram in calibration.histograms.items() if not histogram.total]
    if empty:
        report(
            f"calibration: nothing was detected in these images, so {len(empty)} activations have no "
            f"range ({empty[0]}, …); calibrate with images of objects that the network detects"
        )
    return calibration


def _collect(
    bundle: Bundle,
    images: list[CalibrationImage],
    calibration: Calibration,
    cache: Path | None,
    done: int,
) -> None:
    """Adds images to a calibration, and saves it after each image."""
    stage1, stage2 = (_Observed(bundle.graph(stage, "fp32")) for stage in ("stage1", "stage2"))
    total = done + len(images)
    with Progress("calibrating", total, unit="images", done=done) as progress:
        for image in images:
            prepared = prepare(image.decode(), bundle.manifest.preprocess)
            feeds: dict[str, Array] = {
                "images": prepared.canvas[None],
                "image_sizes": np.array([prepared.size], np.int32),
            }
            histograms: dict[str, Histogram] = {}
            try:
                pyramid = stage1.run(feeds, histograms)
                stage2.run({**pyramid, "image_sizes": feeds["image_sizes"]}, histograms)
            except CalibrationError as error:
                raise CalibrationError(f"{image.name}: {error}") from error
            for key, histogram in histograms.items():
                before = calibration.histograms.get(key)
                calibration.histograms[key] = before + histogram if before else histogram
            calibration.images[image.sha256] = image.name
            if cache is not None:
                calibration.save(cache)
            progress.advance()


class _Observed:
    """A stage's fp32 graph that records histograms of its activations while it runs."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        self._keys: dict[str, list[str]] = {}  # tensor → the names of the activations that read it
        for key, tensor in activations(model).items():
            self._keys.setdefault(tensor, []).append(key)
        self._rois = {node.input[ROIS] for node in model.graph.node if node.op_type == POOLING}
        self._outputs = {value.name for value in model.graph.output}
        self._pieces = Pieces(model, {*self._keys, *self._rois, *self._outputs})

    def run(self, feeds: Mapping[str, Array], histograms: dict[str, Histogram]) -> dict[str, Array]:
        """Returns the graph's outputs; puts the histogram of each activation into `histograms`.

        Raises:
            CalibrationError: an activation is not finite.
        """
        outputs = {}
        # Which rows of the RoIs pooled last are not padding, whose boxes are zeros. Later layers read
        # these rows.
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
            histograms.update(dict.fromkeys(keys, histogram))
        return outputs
