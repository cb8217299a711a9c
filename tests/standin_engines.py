"""Folders of engines whose plans are those of the stand-in TensorRT, and what runs on them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from comask.bundle import STAGES, Bundle, graph_file, sha256
from comask.export.build_options import Profile
from comask.kernels.launch import LEVEL_STRIDES
from comask.runtime.gpu import find_gpu
from comask.runtime.trt.engine_folder import DESCRIPTION, ENGINES, PLANS, EngineFolder, EngineInfo
from comask.runtime.trt.ops import OPS, kernels_sha256
from comask.structures import Detections

PROFILE = Profile(
    batch=(1, 1, 3), height=(32, 96, 128), width=(32, 128, 128), proposals=(1, 200, 200)
)


def write_engines(
    folder: str | Path, *, plugin: str = "python", flavor: str = "tensorrt", **changes: Any
) -> EngineFolder:
    """Writes engines to a bundle as `comask build` does; needs the stand-in driver."""
    from standin_tensorrt import __version__, write_plan

    bundle, gpu = Bundle.open(Path(folder)), find_gpu()
    assert gpu is not None
    info = EngineInfo(
        flavor=flavor, version=__version__, target=f"sm{gpu.capability}", gpu=gpu.name, driver=13000,
        precision="fp32", plugin=plugin, plugin_sha256=kernels_sha256(), profile=PROFILE.ranges(),
        options={}, graphs={s: bundle.manifest.files[graph_file(s, "fp32")] for s in STAGES}, plans={},
        transformed={}, layers={}, seconds={}, verification={}, created="", comask_version="",
    )  # fmt: skip
    info = dataclasses.replace(info, **changes)
    place = bundle.folder / ENGINES / info.folder_name
    place.mkdir(parents=True, exist_ok=True)
    for stage, name in PLANS.items():
        profile = Profile(**info.profile)
        inputs = bundle.manifest.graphs[stage]["inputs"]
        # as `comask build` does
        profiles = profile.by_batch() if flavor == "tensorrt" else (profile,)
        shapes = [profile.shapes(inputs) for profile in profiles]
        needed = tuple(op.name for op in OPS) if plugin == "python" else ()
        graph = bundle.graph(stage, "fp32")
        formats = dict.fromkeys(LEVEL_STRIDES, info.map_format)
        write_plan(place / name, graph, shapes, needed, code=bool(info.options), formats=formats)
    info = dataclasses.replace(info, plans={s: sha256(place / n) for s, n in PLANS.items()})
    (place / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(info)))
    return EngineFolder(place, info)


def picture(h: int, w: int, seed: int = 0) -> np.ndarray:
    from comask.data.shapes import ShapesSource  # needs packages that a GPU's machine may lack

    return np.resize(ShapesSource(num_images=seed + 1, seed=9).image(seed), (h, w, 3))


def assert_equal(found: Detections, expected: Detections) -> None:
    assert len(found) == len(expected) > 0
    assert found.image_size == expected.image_size
    for name in ("boxes_xyxy", "scores", "labels", "mask_probs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
