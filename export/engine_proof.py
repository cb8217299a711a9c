"""Proof that fresh engines compute the model, where there is a GPU to run them on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from comask.export.verify import Batch, verification_batches, verify
from comask.runtime.compare import TOLERANCES
from comask.runtime.gpu import Gpu
from comask.runtime.trt.engine_folder import EngineFolder, EngineInfo, why_not_on
from numpy.typing import NDArray

from comask.bundle import Bundle
from comask.errors import EngineError


def why_not_proved(info: EngineInfo, gpu: Gpu | None) -> str:
    """Why engines cannot run here, so that nothing is said of their results; empty where they can."""
    if reason := why_not_on(info, gpu):
        return reason
    return "" if importlib.util.find_spec("pycuda") else "pycuda is not installed"


def prove_engines(
    bundle: Bundle, engines: EngineFolder, images: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Runs images through both plans and compares every output with PyTorch in fp32.

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
    with open_engines(engines, device=0) as stages:
        proof = verify(
            torch_stages(model_from_bundle(bundle)), stages, batches, manifest.model,
            TOLERANCES[info.precision],
        )  # fmt: skip
    return {"batches": len(batches), **proof}


def _fits(batch: Batch, profile: dict[str, tuple[int, int, int]]) -> bool:
    height, width = batch[0].canvas.shape[:2]
    sizes = {"batch": len(batch), "height": height, "width": width}
    return all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items())
