"""Verifies that graphs and engines compute the same as the network, before they are released."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.bundle import Bundle
from comask.config import ModelConfig, PreprocessConfig
from comask.errors import EngineError, ParityError
from comask.preprocess import Prepared, prepare
from comask.runtime.backends.base import Stages
from comask.runtime.compare import Comparison, compare_stages
from comask.runtime.tolerances import TOLERANCES, Tolerance
from comask.runtime.trt.engine_folder import EngineFolder

# Canvases as shares (y, x) of the configured size: the whole one, a smaller one, and a strip.
SCALES = ((1.0, 1.0), (0.5, 0.5), (1.0, 0.25))

Batch = Sequence[Prepared]

# In another arithmetic, a value at the edge between two codes may be rounded to the other one. Between
# the same int8 graph on an fp16 and on an fp32 base, this changed a trained network's maps by up to 6 %
# of their largest value, scores by 0.014, mask pixels by 0.14, and replaced 9 % of proposals. Twice as
# much is allowed; a wrong weight, plugin or layout causes far larger differences.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Reports the differences between a verified backend and its reference.

    Attributes:
        reference: the name of the reference backend.
        backend: the name of the verified backend.
        worst: the largest differences over all images.
    """

    reference: str
    backend: str
    worst: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Returns one flat object for `manifest.json` and `engine.json`, without the empty failures."""
        worst = dataclasses.asdict(self.worst)
        del worst["failures"]
        return {"reference": self.reference, "backend": self.backend, **worst}


def verify(
    reference: Stages,
    other: Stages,
    batches: Sequence[Batch],
    model: ModelConfig,
    tolerance: Tolerance,
) -> Verification:
    """Runs images through two backends and compares every output.

    Args:
        reference: the network in PyTorch, fp32.
        other: the network's graphs, or the network in another precision.
        batches: batches of images, each with one canvas size.
        model: the network's configuration, for its thresholds.
        tolerance: the tolerance for the precision of `other`.

    Raises:
        ParityError: an output differs; the message names the first one.
    """
    comparison = Comparison()
    for batch in batches:
        compare_stages(reference, other, batch, model, tolerance=tolerance, into=comparison)
    if comparison.failures:
        rest = len(comparison.failures) - 1
        raise ParityError(
            f"{other.backend} does not compute what PyTorch does in fp32: {comparison.failures[0]}"
            + (f" (and {rest} more differences)" if rest else "")
        )
    return Verification(reference=reference.backend, backend=other.backend, worst=comparison)


def verification_batches(
    images: Sequence[NDArray[np.uint8]], preprocess: PreprocessConfig
) -> list[Batch]:
    """Returns a batch for each image at each of `SCALES`, and finally one of two images on one canvas.

    Args:
        images: u8 [h, w, 3], RGB.
        preprocess: the preprocessing of images.
    """
    batches: list[Batch] = []
    for image in images:
        for y, x in SCALES:
            size = dataclasses.replace(
                preprocess,
                short_side=max(1, int(preprocess.short_side * min(y, x))),
                max_side=max(1, int(preprocess.max_side * max(y, x))),
            )
            cut = image[: max(1, int(image.shape[0] * y)), : max(1, int(image.shape[1] * x))]
            batches.append([prepare(np.ascontiguousarray(cut), size)])
    first = prepare(images[0], preprocess)
    mirrored = dataclasses.replace(
        first, canvas=np.ascontiguousarray(first.canvas[:, ::-1]), size=first.canvas.shape[:2]
    )
    batches.append([first, mirrored])
    return batches


def prove_engines(
    bundle: Bundle, engines: EngineFolder, images: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Runs images through both plans and compares every output with PyTorch in fp32.

    int8 engines are compared with their own graphs in ONNX Runtime, because only AP, which was measured
    on those graphs, tells whether int8 is accurate.

    Args:
        bundle: the bundle, with its weights.
        engines: the bundle's engines, for GPU 0.
        images: u8 [h, w, 3], RGB.

    Returns:
        The number of batches and the largest differences, for `engine.json`.

    Raises:
        ParityError: an output differs; the message names the first one.
        EngineError: the plans cannot be opened or run, or support none of the images' canvases.
    """
    from comask.runtime.backends.ort import ort_stages
    from comask.runtime.backends.pytorch import model_from_bundle, torch_stages
    from comask.runtime.backends.trt import open_engines

    manifest, info = bundle.manifest, engines.info
    batches = [
        batch
        for batch in verification_batches(images, manifest.preprocess)
        if _fits(batch, info.profile)
    ]
    if not batches:
        raise EngineError(
            "the engines support none of the canvases of the images that they are compared on: give "
            "other images by --data, or widen --profile"
        )
    if info.precision == "int8":
        reference, tolerance = ort_stages(bundle, "int8", "cpu"), INT8_TOLERANCE
    else:
        reference = torch_stages(model_from_bundle(bundle))
        tolerance = TOLERANCES[info.precision]
    with open_engines(engines, device=0) as stages, reference:
        verified = verify(reference, stages, batches, manifest.model, tolerance)
    return {"batches": len(batches), **verified.to_dict()}


def _fits(batch: Batch, profile: dict[str, tuple[int, int, int]]) -> bool:
    height, width = batch[0].canvas.shape[:2]
    sizes = {"batch": len(batch), "height": height, "width": width}
    return all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items())
