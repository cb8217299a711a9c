"""Proof that fresh engines compute the model, where there is a GPU to run them on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Bundle
from comask.errors import EngineError
from comask.export.verify import Batch, verification_batches, verify
from comask.runtime.compare import TOLERANCES, Tolerance
from comask.runtime.gpu import Gpu
from comask.runtime.trt.engine_folder import EngineFolder, EngineInfo, why_not_on

# Values at the edge between two codes fall to either side in another arithmetic. Between the same int8
# graph on an fp16 and on an fp32 base, that moved a trained network's maps by up to 6 % of their largest
# value, scores by 0.014, mask pixels by 0.14, and exchanged 9 % of proposals. Twice that is allowed; a
# wrong weight, plugin or layout is off by far more.
INT8_TOLERANCE = Tolerance(
    relative=0.12,
    box=1.0,
    box_side=0.05,
    score=0.03,
    mask=0.3,
    tie=0.03,
    contested=0.2,
    contested_detections=0.2,
    alike=(0.3, 0.5),
)


def why_not_proved(info: EngineInfo, gpu: Gpu | None) -> str:
    """Why engines cannot run here, so that nothing is said of their results; empty where they can."""
    if reason := why_not_on(info, gpu):
        return reason
    return "" if importlib.util.find_spec("pycuda") else "pycuda is not installed"


def prove_engines(
    bundle: Bundle, engines: EngineFolder, images: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Runs images through both plans and compares every output with PyTorch in fp32.

    int8 engines are compared with their own graphs on ONNX Runtime: whether int8 is still the model
    says AP alone, which was measured on those.

    Args:
        bundle: with its weights.
        engines: of the bundle, and for GPU 0.
        images: u8 [h, w, 3], RGB.

    Returns:
        the worst differences, for `engine.json`.

    Raises:
        ParityError: naming the first output that differs.
        EngineError: when the plans do not open or run, or take none of the images' canvases.
    """
    from comask.runtime.ort_session import ort_stages
    from comask.runtime.torch_session import model_from_bundle, torch_stages
    from comask.runtime.trt.session import open_engines

    manifest, info = bundle.manifest, engines.info
    batches = [
        batch
        for batch in verification_batches(images, manifest.preprocess)
        if _fits(batch, info.profile)
    ]
    if not batches:
        raise EngineError(
            "the engines take none of the canvases of the images that they are compared on: name "
            "other images by --val-data, or widen --profile"
        )
    if info.precision == "int8":
        reference, tolerance = ort_stages(bundle, "int8", "cpu"), INT8_TOLERANCE
    else:
        reference = torch_stages(model_from_bundle(bundle))
        tolerance = TOLERANCES[info.precision]
    with open_engines(engines, device=0) as stages, reference:
        proof = verify(reference, stages, batches, manifest.model, tolerance)
    return {"batches": len(batches), **proof}


def _fits(batch: Batch, profile: dict[str, tuple[int, int, int]]) -> bool:
    height, width = batch[0].canvas.shape[:2]
    sizes = {"batch": len(batch), "height": height, "width": width}
    return all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items())
