"""Checks that PyTorch on the GPU computes the network, and times one forward pass on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from clock import event_seconds, wall_seconds
from context import Context
from kernel_values import TORCH
from rows import RUNS, Check, Figure
from stand_in_session import PICTURES, SIZES, drawn, prepared

AMP_TIME = "torch-amp-{batch}"  # the remembered seconds of one forward pass
BATCHES = (1, 8)


def batches(context: Context) -> list[Any]:
    """Returns batches of drawn pictures, each of one canvas, for `compare_stages`."""
    preprocess = context.bundle().manifest.preprocess
    pictures = [[PICTURES[0]], [drawn(SIZES[1], 5)], [drawn((90, 120), 6)], PICTURES[:2]]
    return [[prepared(image, preprocess) for image in images] for images in pictures]


def shapes_batches(context: Context) -> list[Any]:
    """Returns batches of images of `shapes`, as `comask build` compares engines on."""
    from comask.data.shapes import ShapesSource
    from comask.export.verify import verification_batches

    count = 1 if context.rehearsal else 3
    source = ShapesSource(num_images=count, seed=8)
    images = [source.image(i) for i in range(count)]
    return verification_batches(images, context.bundle().manifest.preprocess)


def compared(context: Context, stages: Any, precision: str, *, shapes: bool = False) -> Figure:
    """Compares a backend's outputs with PyTorch in fp32 on the CPU; fails beyond the tolerance.

    Args:
        context: the context of the checks.
        stages: the backend, which is closed at the end.
        precision: its precision.
        shapes: whether to run images of `shapes`, which need OpenCV, in place of drawn ones.

    Raises:
        ParityError: if an output differs by more than the precision's tolerance.
    """
    import torch

    from comask.export.verify import verify
    from comask.runtime.backends.pytorch import model_from_bundle, torch_stages
    from comask.runtime.tolerances import TOLERANCES

    # cuDNN's convolutions use TensorFloat-32 by default, which has the mantissa of f16.
    torch.backends.cudnn.allow_tf32 = False
    bundle, tolerance = context.bundle(), TOLERANCES[precision]
    with stages, torch_stages(model_from_bundle(bundle)) as reference:
        images = shapes_batches(context) if shapes else batches(context)
        worst = verify(reference, stages, images, bundle.manifest.model, tolerance).worst
    note = f"boxes {worst.box:.3g} px, scores {worst.score:.2g}, masks {worst.mask:.2g}"
    error = max(worst.relative.values())
    return Figure(value=error, unit="relative", most=tolerance.relative, note=note)


def torch_outputs(context: Context, *, half: bool) -> Figure:
    """Compares the stage outputs of PyTorch on the GPU with PyTorch on the CPU."""
    from comask.models.precision import half_around
    from comask.preprocess import stacked
    from comask.runtime.backends.pytorch import model_from_bundle, torch_stages
    from comask.runtime.compare import PYRAMID
    from comask.runtime.tolerances import TOLERANCES

    model = model_from_bundle(context.bundle())
    if not half:
        return compared(context, torch_stages(model.to(context.device)), "fp32")
    reference = torch_stages(model_from_bundle(context.bundle()))
    half_around(model, ())
    worst, stages = 0.0, torch_stages(model.to(context.device))
    for batch in batches(context):
        images, sizes = stacked(batch)
        feeds = {"images": images, "image_sizes": sizes}
        maps, expected = stages.stage1.run(feeds), reference.stage1.run(feeds)
        for level in PYRAMID:
            error = np.abs(maps[level].astype(np.float32) - expected[level]).max()
            worst = max(worst, float(error / np.abs(expected[level]).max()))
    return Figure(value=worst, unit="relative", most=TOLERANCES["fp16"].relative)


def forward_time(context: Context, *, batch: int) -> Figure:
    """Times one forward pass of both stages on the device: channels-last, f16 autocast, no copies."""
    import torch

    model, feeds = timed_model(context), context.images(batch)
    images, sizes = (torch.from_numpy(a).to(context.device) for a in feeds.values())
    kind = torch.bfloat16 if context.rehearsal else torch.float16

    def forward() -> None:
        maps = model.stage1(images, sizes)
        model.stage2(**maps, image_sizes=sizes)

    with torch.inference_mode(), torch.autocast(context.device, kind):
        took = _seconds(context, forward)
    context.remember(AMP_TIME.format(batch=batch), took)
    return Figure(
        value=batch / took, unit="images/s", note=f"{1e3 * took:.2f} ms per batch of {batch}"
    )


def host_time(context: Context) -> Figure:
    """Compares the torch backend, from host images to host results, with the pass on the device."""
    from comask.runtime.backends.pytorch import torch_stages

    with torch_stages(timed_model(context)) as stages:
        feeds = context.images(1)
        took = wall_seconds(lambda: stages.run(**feeds), max(2, context.sizes.repeats // 5))
    device = context.recall(AMP_TIME.format(batch=1))
    note = f"{1e3 * took:.1f} ms in fp32 against {1e3 * device:.1f} ms in AMP"
    return Figure(value=took / device, unit="times as long", note=note)


def timed_model(context: Context) -> Any:
    """Returns the network that is timed, with random weights, channels-last, on the device."""
    import torch

    from comask.models.comask import CoMask
    from comask.presets import preset

    torch.manual_seed(0)
    config = preset(context.sizes.preset)
    model = CoMask(config.model, config.preprocess).eval().to(context.device)
    return model.to(memory_format=torch.channels_last)


def _seconds(context: Context, call: Callable[[], None]) -> float:
    repeats = max(2, context.sizes.repeats // 5)
    if context.rehearsal:
        return wall_seconds(call, repeats)
    import torch

    torch.backends.cudnn.benchmark = True
    for _ in range(3):
        call()

    def queue() -> None:
        for _ in range(4):
            call()

    return event_seconds(queue, max(3, repeats // 4)) / 4


def nms_of_nan(context: Context) -> Figure:
    """Runs an image through a network whose weights are NaN; the backend must say so."""
    import torch

    from comask.errors import NotFiniteError
    from comask.runtime.backends.pytorch import model_from_bundle, torch_stages

    model = model_from_bundle(context.bundle()).to(context.device)
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(float("nan"))
    sizes = np.array([PICTURES[0].shape[:2]], np.int32)
    try:
        torch_stages(model).run(PICTURES[0][None], sizes)
    except NotFiniteError as error:
        return Figure(value=1.0, note=str(error))
    raise RuntimeError("NaN went through unnoticed")


def checks() -> list[Check]:
    """Returns the rows of the group."""
    needs = (TORCH, "torchvision", "safetensors", "trained bundle", "C++ compiler")
    return [
        Check(
            name="PyTorch on the GPU equals the CPU, fp32", run=partial(torch_outputs, half=False),
            needs=needs, limit=60, compared="every output of PyTorch in fp32 on the CPU",
            fails="an output differs beyond the tolerance of fp32, TensorFloat-32 being off",
        ),
        Check(
            name="PyTorch on the GPU equals the CPU, maps in fp16", needs=needs, limit=60,
            run=partial(torch_outputs, half=True), compared="the pyramid in fp32 on the CPU",
            fails="a map differs by more than fp16 engines may, if all layers are fp16",
        ),
        Check(
            name="NaN is reported", run=nms_of_nan, needs=needs, compared="NotFiniteError",
            fails="a network of NaN gives detections, or none, without an error",
        ),
        *(
            Check(
                name=f"PyTorch AMP channels-last on the device, batch {batch}", needs=needs[:2],
                run=partial(forward_time, batch=batch), compared=RUNS, fails="it does not run", limit=60,
                provides=f"PyTorch's time, batch {batch}",
            )
            for batch in BATCHES
        ),
        Check(
            name="torch backend, host to host", run=host_time, limit=60,
            needs=(*needs[:3], "PyTorch's time, batch 1"), fails="it does not run",
            compared="the pass on the device; what copies and fp32 cost",
        ),
    ]  # fmt: skip
