"""Are the scales in int8 graphs those of the calibration?

Too large a scale only rounds more coarsely, so that no tensor shows it; AP may, or not.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from comask.bundle import INT8_BASE, STAGES, Bundle
from comask.calib.cache import CACHE, Calibration
from comask.calib.layers import readings
from comask.calib.qdq import LARGEST

LIMIT = 1e-2  # relative: a scale is an f16, which rounds by 2^-11


def altered_scales(bundle: Bundle) -> list[str]:
    """One sentence an activation of the int8 graphs whose scale is not the calibration's.

    Args:
        bundle: with int8 graphs, and the cache of their calibration.

    Raises:
        BundleError: when a graph is missing or altered.
        CalibrationError: when the bundle has no cache, or one of other graphs.
    """
    path = bundle.folder / CACHE
    calibration = Calibration.load(path)
    calibration.require(bundle, path)
    largest = calibration.ranges(bundle.manifest.verification["int8"]["calibration"]["method"])
    found = []
    for stage in STAGES:
        names = {
            reading.tensor: reading.name for reading in readings(_graph(bundle, stage, INT8_BASE))
        }
        scales = {t.name: t for t in _graph(bundle, stage, "int8").graph.initializer}
        for tensor, name in names.items():
            # layers that stayed float have none; where all is zero any scale serves
            if f"{tensor}.scale" not in scales or not largest.get(name):
                continue
            scale = numpy_helper.to_array(scales[f"{tensor}.scale"])
            smallest = float(np.finfo(scale.dtype).smallest_subnormal)
            expected = largest[name] / LARGEST
            if not abs(float(scale) - expected) <= max(LIMIT * expected, smallest):
                found.append(
                    f"what {name} reads in {stage} has another scale than its calibration gives: "
                    f"{float(scale):.4g}, not {expected:.4g}"
                )
    return found


def _graph(bundle: Bundle, stage: str, precision: str) -> onnx.ModelProto:
    return onnx.load(bundle.graph(stage, precision))
