"""Checks that PyTorch and ONNX Runtime on CUDA and the engines still compute the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from context import Context
from rows import Figure, UnavailableError

AP_POINTS = {"fp32": 0.02, "fp16": 0.1, "int8": 0.3}  # limits in AP points
TENSORS = ("fp32", "fp16")  # precisions whose outputs are compared; int8 is judged by AP
FLAVORS = ("tensorrt", "tensorrt-rtx")
PLUGINS = ("python", "aot", "none")


def torch_outputs(context: Context) -> Figure:
    """Compares the stage outputs of PyTorch on CUDA with PyTorch on the CPU."""
    context.need_gpu()
    from comask.bundle import Bundle
    from comask.runtime.backends import open_stages

    bundle = Bundle.open(context.trained_bundle)
    return _compare(context, bundle, open_stages(bundle, "torch"), "fp32")


def onnxruntime_outputs(context: Context, precision: str) -> Figure:
    """Compares the stage outputs of ONNX Runtime's CUDA provider with PyTorch on the CPU."""
    from comask.bundle import Bundle

    bundle = Bundle.open(context.trained_bundle)
    with open_onnxruntime(context, bundle, precision) as stages:
        return _compare(context, bundle, stages, precision)


def engine_outputs(context: Context, flavor: str, precision: str, plugin: str) -> Figure:
    """Compares the stage outputs of a newly built engine with PyTorch on the CPU."""
    from comask.bundle import Bundle
    from comask.runtime.backends import open_stages

    bundle = Bundle.open(build_engine(context, context.trained_bundle, flavor, precision, plugin))
    with open_stages(bundle, f"{flavor}:{precision}") as stages:
        return _compare(context, bundle, stages, precision)


def ap(context: Context, backend: str, precision: str) -> Figure:
    """Measures the larger difference of box and mask AP from PyTorch with `comask eval`."""
    from comask.bundle import Bundle

    bundle = with_int8(context) if precision == "int8" else context.trained_bundle
    if backend == "onnxruntime":
        open_onnxruntime(context, Bundle.open(bundle), precision).close()
    else:
        bundle = build_engine(context, bundle, backend, precision, "python")
    name = f"{backend}:{precision}"
    report = json.loads(
        context.command(
            "eval", str(bundle), "--data", "shapes", "--backend", "torch",
            "--backend", name, "--no-record", "--json", "-", "--tolerance", "1000",
        )
    )  # fmt: skip
    comparison = report["comparisons"][name]
    worst = max(abs(comparison["deltas"][task]["AP"]) for task in ("bbox", "segm"))
    note = (
        f"mask AP {report['backends']['torch']['segm']['AP']:.1f} in PyTorch; "
        f"largest difference of 24 numbers {comparison['largest']:.2g}"
    )
    return Figure(value=worst, unit="AP points", most=AP_POINTS[precision], note=note)


def int8_speed(context: Context, flavor: str) -> Figure:
    """Returns the speed of int8 relative to fp16 in both graphs, as `comask build` measures it."""
    from comask.bundle import Bundle

    source = with_int8(context)
    for precision in ("fp16", "int8"):
        bundle = build_engine(context, source, flavor, precision, "python")
    seconds = Bundle.open(bundle).manifest.verification["int8"]["latency"]
    note = f"{1e3 * seconds['int8']:.2f} ms per image, fp16 {1e3 * seconds['fp16']:.2f} ms"
    return Figure(value=seconds["fp16"] / seconds["int8"], unit="x", least=1.0, note=note)


def with_int8(context: Context) -> Path:
    """Returns the trained bundle with int8 graphs; quantizes it on `shapes` if it has none."""
    from comask.bundle import Bundle

    context.need_gpu()
    bundle = context.trained_bundle
    if "int8" not in Bundle.open(bundle).manifest.precisions:
        context.command(
            "quantize", str(bundle), "--calib-data", "shapes", "--data", "shapes",
            "--max-loss", str(AP_POINTS["int8"]),
        )  # fmt: skip
    return bundle


def build_engine(context: Context, source: Path, flavor: str, precision: str, plugin: str) -> Path:
    """Runs `comask build` in a copy of a bundle; an existing engine is not built again.

    Args:
        context: the context of the checks.
        source: the bundle to copy.
        flavor, precision, plugin: the properties of the engines.

    Returns:
        The copy, which contains these engines and no others of the precision.

    Raises:
        UnavailableError: if the flavor is not installed or does not support the plugin.
        RuntimeError: if the copy contains other engines.
    """
    context.need_gpu()
    from comask.bundle import Bundle
    from comask.errors import EngineError
    from comask.export.build_options import BuildOptions, check_options
    from comask.runtime.device import find_gpu
    from comask.runtime.trt.engine import load_flavor
    from comask.runtime.trt.engine_folder import find_engines

    try:
        check_options(load_flavor(flavor), plugin, BuildOptions(), find_gpu())
    except EngineError as error:
        raise UnavailableError(str(error)) from error
    bundle = context.without_engines(source, flavor, plugin)
    context.command(
        "build", str(bundle), "--precision", precision, "--engine", flavor, "--plugin", plugin
    )
    there = [engines.info for engines in find_engines(Bundle.open(bundle))]
    found = [(info.flavor, info.plugin) for info in there if info.precision == precision]
    if found != [(flavor, plugin)]:
        raise RuntimeError(f"{bundle} holds {found} in {precision}, not {flavor} with {plugin}")
    return bundle


def open_onnxruntime(context: Context, bundle: Any, precision: str) -> Any:
    """Opens both stages in ONNX Runtime, on the CPU in a rehearsal.

    Raises:
        UnavailableError: if ONNX Runtime does not use its CUDA provider.
    """
    import onnxruntime

    from comask.runtime.backends.ort import CUDA_PROVIDER, ort_stages

    stages = ort_stages(bundle, precision)
    providers = {stage.provider for stage in (stages.stage1, stages.stage2)}
    if context.device == "cuda" and providers != {CUDA_PROVIDER}:
        stages.close()
        there = CUDA_PROVIDER in onnxruntime.get_available_providers()
        raise UnavailableError(
            f"onnxruntime {onnxruntime.__version__} uses {', '.join(sorted(providers))}; "
            + ("its CUDA libraries are missing" if there else "pip install onnxruntime-gpu")
        )
    return stages


def smallest_engine(context: Context, flavor: str) -> Figure:
    """Runs one convolution to test whether this TensorRT works on this GPU at all."""
    context.need_gpu()
    import torch

    from comask.runtime.trt.engine import load_flavor

    loaded = load_flavor(flavor)
    trt = loaded.trt
    builder = trt.Builder(loaded.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    weights = torch.randn(8, 4, 3, 3)
    layer = network.add_convolution_nd(
        network.add_input("x", trt.float32, (1, 4, 32, 32)), 8, (3, 3),
        trt.Weights(weights.numpy()), trt.Weights(),
    )  # fmt: skip
    layer.padding_nd = (1, 1)
    layer.get_output(0).name = "y"
    network.mark_output(layer.get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise RuntimeError(f"does not build: {loaded.errors()}")
    loaded.clear()
    engine = trt.Runtime(loaded.log).deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"cannot be deserialised: {loaded.errors()}")
    execution = engine.create_execution_context()
    if execution is None:
        raise RuntimeError(f"cannot create a context: {loaded.errors()}")
    x, y = torch.randn(1, 4, 32, 32, device="cuda"), torch.zeros(1, 8, 32, 32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    execution.set_tensor_address("x", x.data_ptr())
    execution.set_tensor_address("y", y.data_ptr())
    if not execution.execute_async_v3(stream.cuda_stream):
        raise RuntimeError(f"does not run: {loaded.errors()}")
    stream.synchronize()
    expected = torch.nn.functional.conv2d(x.cpu(), weights, padding=1)
    error = float((y.cpu() - expected).abs().max() / expected.abs().max())
    # TensorFloat-32 has 10 bits of mantissa
    return Figure(value=error, unit="relative", most=2e-3, note=loaded.version)


def _compare(context: Context, bundle: Any, stages: Any, precision: str) -> Figure:
    """Returns the largest relative error of the maps; fails beyond the precision's tolerance."""
    import torch

    from comask.data.shapes import ShapesSource
    from comask.export.verify import verification_batches, verify
    from comask.runtime.backends.pytorch import model_from_bundle, torch_stages
    from comask.runtime.compare import TOLERANCES

    # otherwise PyTorch's convolutions on CUDA use the ten mantissa bits of TensorFloat-32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    source, manifest = ShapesSource(num_images=4, seed=4_000_000), bundle.manifest
    worst = verify(
        torch_stages(model_from_bundle(bundle)),
        stages,
        verification_batches([source.image(i) for i in range(4)], manifest.preprocess),
        manifest.model,
        TOLERANCES[precision],
    ).worst
    note = (
        f"{worst.detections} detections, boxes within {worst.box:.1e} px, scores within "
        f"{worst.score:.1e}"
    )
    error = max(worst.relative.values())
    return Figure(value=error, unit="relative", most=TOLERANCES[precision].relative, note=note)


def _checks() -> dict[str, Callable[[Context], Figure]]:
    checks: dict[str, Callable[[Context], Figure]] = {
        f"{flavor} runs one convolution": partial(smallest_engine, flavor=flavor)
        for flavor in FLAVORS
    }
    checks["PyTorch CUDA equals CPU"] = torch_outputs
    for flavor in FLAVORS:
        checks[f"{flavor} int8, AP"] = partial(ap, backend=flavor, precision="int8")
        checks[f"{flavor} int8, against fp16"] = partial(int8_speed, flavor=flavor)
    for precision in TENSORS:
        name = f"onnxruntime CUDA {precision}"
        checks[f"{name} equals PyTorch"] = partial(onnxruntime_outputs, precision=precision)
        checks[f"{name}, AP"] = partial(ap, backend="onnxruntime", precision=precision)
        for flavor in FLAVORS:
            for plugin in PLUGINS:
                checks[f"{flavor} {precision}, plugin {plugin}, equals PyTorch"] = partial(
                    engine_outputs, flavor=flavor, precision=precision, plugin=plugin
                )
            checks[f"{flavor} {precision}, AP"] = partial(ap, backend=flavor, precision=precision)
    return checks


CHECKS = _checks()
