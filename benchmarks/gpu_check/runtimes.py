"""Tries whether ONNX Runtime and each TensorRT work here at all, before anything is made for them."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

from building import FLAVORS, WORKS
from context import Context
from needs import STAND_IN
from rows import Check, Figure, UnavailableError
from runner import OR

ORT_WORKS = "onnxruntime uses CUDA"
ANY_ENGINE = OR.join(WORKS.values())
TF32 = 2e-3  # TensorFloat-32 has 10 bits of mantissa


def open_onnxruntime(context: Context, bundle: Any, precision: str) -> Any:
    """Opens both stages in ONNX Runtime, on the CPU in a rehearsal.

    Raises:
        UnavailableError: if this ONNX Runtime was built without CUDA.
        RuntimeError: if its CUDA provider is there and is not used.
    """
    import onnxruntime

    from comask.runtime.backends.ort import CUDA_PROVIDER, ort_stages

    if context.rehearsal:
        return ort_stages(bundle, precision, "cpu")
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise UnavailableError(
            f"onnxruntime {onnxruntime.__version__} has no CUDA provider: pip install onnxruntime-gpu",
            ORT_WORKS,
        )
    stages = ort_stages(bundle, precision)
    providers = {stage.provider for stage in (stages.stage1, stages.stage2)}
    if providers != {CUDA_PROVIDER}:
        stages.close()
        raise RuntimeError(
            f"it uses {', '.join(sorted(providers))}: its CUDA libraries are not found"
        )
    return stages


def onnxruntime_uses_cuda(context: Context) -> Figure:
    """Opens the trained graphs; the CUDA provider must find its libraries by itself."""
    import onnxruntime

    open_onnxruntime(context, context.bundle(), "fp32").close()
    return Figure(value=1.0, note=f"onnxruntime {onnxruntime.__version__}")


def smallest_engine(context: Context, *, flavor: str) -> Figure:
    """Builds and runs one convolution."""
    if context.rehearsal:
        return Figure(value=0.0, unit="relative", most=TF32, note=STAND_IN)
    import torch

    from comask.runtime.trt.flavor import load_flavor

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
    runtime = trt.Runtime(loaded.log)
    _require_support(loaded, runtime, bytes(plan))
    engine = runtime.deserialize_cuda_engine(plan)
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
    return Figure(value=error, unit="relative", most=TF32, note=loaded.version)


def _require_support(loaded: Any, runtime: Any, plan: bytes) -> None:
    """Raises UnavailableError if the flavor itself says that it does not support the GPU."""
    from comask.runtime.trt.engine import why_unsupported

    if reason := why_unsupported(loaded, runtime, plan):
        raise UnavailableError(
            f"{loaded.name} {loaded.version} does not support this GPU: {reason}"
        )


def half_graphs(context: Context) -> Figure:
    """Adds fp16 graphs to the trained bundle, unless it has them."""
    if "fp16" not in context.bundle().manifest.precisions:
        context.command("export", str(context.trained), "--precision", "fp16", "--limit", "1")
    verified = context.bundle().manifest.verification["fp16"]
    return Figure(value=max(verified["relative"].values()), unit="relative", most=1e-2)


def timed_bundle(context: Context) -> Figure:
    """Exports the network that is timed, with random weights, in fp32 and fp16."""
    if context.rehearsal:
        shutil.copytree(context.trained, context.timed)
        return Figure(value=1.0, note="in a rehearsal, the trained bundle")
    context.make_bundle(
        context.timed, "--preset", context.sizes.preset, "--set", "train.max_steps=0",
        "--set", "train.weights=none", score_threshold="0",
    )  # fmt: skip
    return Figure(value=1.0, note=context.sizes.preset)


def checks() -> list[Check]:
    """Returns the rows of the group."""
    made_for = OR.join((ANY_ENGINE, ORT_WORKS))
    packages = ("onnx", "opencv", "pycocotools", "click", "safetensors")
    return [
        Check(
            name="onnxruntime uses its CUDA provider", run=onnxruntime_uses_cuda, provides=ORT_WORKS,
            needs=("GPU", "torch", "onnxruntime", "trained bundle"), limit=60, isolated=True,
            compared="the provider that was asked for",
            fails="it falls back to the CPU although onnxruntime-gpu is installed",
        ),
        *(
            Check(
                name=f"{flavor} runs one convolution", run=partial(smallest_engine, flavor=flavor),
                needs=("GPU", "torch", "device", "kernels", flavor), provides=WORKS[flavor],
                limit=90, isolated=True, compared="torch's convolution on the CPU",
                fails="it does not build, load or run; rows that need this flavor are then skipped",
            )
            for flavor in FLAVORS
        ),
        Check(
            name="fp16 graphs of the trained bundle", run=half_graphs, provides="fp16 graphs",
            needs=(made_for, "trained bundle", *packages), limit=120,
            compared="PyTorch in fp32 on the CPU", fails="export or its comparison fails",
        ),
        Check(
            name="a bundle to time", run=timed_bundle, provides="timed bundle", limit=240,
            needs=(made_for, "fp16 graphs", "faster-coco-eval", "matplotlib", *packages),
            compared="the exporter's own comparison",
            fails="comask train or comask export fails",
        ),
    ]  # fmt: skip
