"""Counts the work of both stages as TensorRT-RTX gets them: layers, FLOPs, bytes and the plans' size.

    python benchmarks/engine_work.py OLD NEW --size 800x1344

Each bundle's graphs are those of `comask build --plugin none`. FLOPs are twice the multiplications of
convolutions and matrix products, of one image. "Written" is the size of all tensors between the layers
in the graph's precision; TensorRT fuses layers, so an engine writes less, and the difference between two
bundles is an upper bound as well. Layers are those of the parsed network; most of them compute shapes
while an engine is built or its shapes are set, so those with a large output are counted, too. Nothing is
run.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnx

from comask.bundle import Bundle
from comask.export.trt_functions import without_plugins
from comask.runtime.trt.engine_folder import ENGINES, PLANS
from comask.runtime.trt.flavor import load_flavor

FLAVOR = "tensorrt-rtx"
PROPOSALS = 1000
LARGE = 10_000  # more elements than any shape or list of detections has


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a stage for one image.

    Attributes:
        layers: of the parsed network.
        large: layers with an output of at least `LARGE` elements.
        flops: of its convolutions and matrix products.
        written: bytes of all tensors between the layers.
        plans: the size of each plan in the bundle's folder.
    """

    layers: int
    large: int
    flops: int
    written: int
    plans: tuple[int, ...]


def for_one_image(model: onnx.ModelProto, height: int, width: int) -> None:
    """Gives the graph's inputs the shapes of one image."""
    sizes = {"batch": 1, "proposals": PROPOSALS, "rows": height // 32, "columns": width // 32}
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                factor, _, name = dim.dim_param.rpartition("*")
                dim.dim_value = int(factor or 1) * sizes[name]


def parsed(trt: Any, graph: Path) -> Iterator[Any]:
    """Yields the layers of TensorRT-RTX's network.

    Raises:
        SystemExit: TensorRT-RTX cannot parse the graph.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise SystemExit(f"cannot parse: {parser.get_error(0).desc()}")
    yield from map(network.get_layer, range(network.num_layers))


def products(trt: Any, layer: Any) -> int:
    """Returns the multiplications of a layer, 0 if it is no convolution or matrix product."""
    kinds = trt.LayerType
    if layer.type not in (kinds.CONVOLUTION, kinds.DECONVOLUTION, kinds.MATRIX_MULTIPLY):
        return 0
    data, result = layer.get_input(0).shape, layer.get_output(0).shape
    if layer.type != kinds.MATRIX_MULTIPLY:
        layer.__class__ = {
            kinds.CONVOLUTION: trt.IConvolutionLayer, kinds.DECONVOLUTION: trt.IDeconvolutionLayer,
        }[layer.type]  # fmt: skip
        taps = math.prod(layer.kernel_size_nd) // layer.num_groups
        if layer.type == kinds.CONVOLUTION:
            return math.prod(result) * data[1] * taps
        return math.prod(data) * result[1] * taps
    layer.__class__ = trt.IMatrixMultiplyLayer
    inner = data[-2] if layer.op0 == trt.MatrixOperation.TRANSPOSE else data[-1]
    return math.prod(result) * inner


def counted(trt: Any, graph: Path) -> tuple[int, int, int, int]:
    """Returns the number of layers, that of the large ones, the FLOPs and the bytes written.

    Raises:
        SystemExit: the shape of a tensor is unknown, so that a sum would be too small.
    """
    count, large, flops, written, unknown = 0, 0, 0, 0, []
    for layer in parsed(trt, graph):
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        if any(-1 in output.shape for output in outputs):
            unknown.append(layer.name)
            continue
        count += 1
        flops += 2 * products(trt, layer)
        large += any(math.prod(output.shape) >= LARGE for output in outputs)
        if layer.type not in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE):
            written += sum(math.prod(o.shape) * o.dtype.itemsize for o in outputs)
    if unknown:
        raise SystemExit(f"{len(unknown)} layers have no shape: {', '.join(unknown[:5])}")
    return count, large, flops, written


def work(folder: Path, precision: str, height: int, width: int) -> Iterator[tuple[str, Work]]:
    """Yields the work of each stage of a bundle."""
    bundle, trt = Bundle.open(folder), load_flavor(FLAVOR).trt
    with tempfile.TemporaryDirectory() as made:
        for stage, plan in PLANS.items():
            graph = without_plugins(onnx.load(bundle.graph(stage, precision)))
            for_one_image(graph, height, width)
            path = Path(made) / "graph.onnx"
            onnx.save(graph, path)
            plans = sorted((folder / ENGINES).glob(f"{FLAVOR}*/{plan}"))
            yield stage, Work(*counted(trt, path), tuple(plan.stat().st_size for plan in plans))


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--precision", default="fp32")
@click.option("--size", default="800x1344")
def main(bundles: tuple[Path, ...], precision: str, size: str) -> None:
    """Prints a Markdown table with a row for each stage of each bundle."""
    height, width = map(int, size.split("x"))
    print("| bundle | stage | layers | with large outputs | GFLOP | GB written | plan, MB |")
    print("|---|---|---|---|---|---|---|")
    for folder in bundles:
        for stage, found in work(folder, precision, height, width):
            plans = ", ".join(f"{size / 1e6:.1f}" for size in found.plans) or "not built"
            print(f"| {folder.name} | {stage} | {found.layers} | {found.large} | {found.flops / 1e9:.1f} "
                  f"| {found.written / 1e9:.2f} | {plans} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
