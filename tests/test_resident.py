"""What stays on a backend's device: outputs between the stages, and a stream's frames and masks.

The device is the CPU here. On a GPU, the same code runs with kernels that are launched by the driver.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from standin_engines import assert_equal, picture
from test_stream_masks import assert_rles

from comask.errors import ImageError, KernelUnavailableError
from comask.kernels import run
from comask.kernels.launch import LEVEL_STRIDES
from comask.preprocess import stacked
from comask.runtime import Predictor
from comask.runtime.backends.ort import OrtMemory
from comask.runtime.backends.pytorch import TorchMemory
from comask.runtime.lanes import HostLanes
from comask.runtime.resident import ResidentLanes, with_kernels

MEMORIES: dict[str, Any] = {
    "torch": lambda: TorchMemory(torch.device("cpu")), "onnxruntime": lambda: OrtMemory(None),
}  # fmt: skip
PICTURES = [picture(96, 128, 0), picture(48, 64, 1), picture(150, 200, 2)]  # of one canvas


@pytest.fixture(
    scope="module",
    params=[("micro_bundle", "torch"), ("micro_bundle", "onnxruntime"), ("framed_bundle", "torch")],
    ids=str,
)
def predictors(request: pytest.FixtureRequest) -> Iterator[list[Predictor]]:
    """A predictor whose large arrays stay on the device, and one that copies them to the host."""
    fixture, backend = request.param
    bundle = request.getfixturevalue(fixture)
    with Predictor.load(bundle, backend, device="cpu") as host:
        resident = Predictor.load(bundle, backend, device="cpu")
        resident.stages = dataclasses.replace(resident.stages, memory=MEMORIES[backend]())
        for stage in (resident.stages.stage1, resident.stages.stage2):
            stage.keeps = True  # type: ignore[attr-defined]  # as on a GPU
        with resident:
            yield [resident, host]


def test_the_pyramid_stays_between_the_stages(predictors: list[Predictor]) -> None:
    stages = predictors[0].stages
    images, sizes = stacked([predictors[0].prepare(PICTURES[0])])
    feeds = {"images": images, "image_sizes": sizes}
    kept = stages.stage1.run(feeds, keep=LEVEL_STRIDES)
    copied = stages.stage1.run(feeds)
    for name, value in copied.items():
        assert isinstance(value, np.ndarray)
        assert isinstance(kept[name], np.ndarray) == (name not in LEVEL_STRIDES)
    whole = stages.stage2.run({**copied, "image_sizes": sizes})
    found = stages.stage2.run({**kept, "image_sizes": sizes}, keep=("masks",))
    assert not isinstance(found["masks"], np.ndarray)
    assert stages.memory is not None
    found["masks"] = stages.memory.to_host(found["masks"])
    for name, expected in whole.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def test_a_stream_gives_the_hosts_results(predictors: list[Predictor]) -> None:
    luma = np.random.default_rng(0).integers(0, 256, (96, 128), dtype=np.uint8)
    chroma = np.random.default_rng(1).integers(0, 256, (48, 64, 2), dtype=np.uint8)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (PICTURES[0], {}),
        (PICTURES[1], {"rle": True}),
        (torch.from_numpy(PICTURES[2]).permute(2, 0, 1), {"rle": True}),
        (PICTURES[0][:, :, ::-1], {"format": "bgr"}),
        ((luma, chroma), {"format": "nv12", "full_range": True, "rle": True}),
        (PICTURES, {"rle": True}),
    ]
    with predictors[0].stream() as resident, predictors[1].stream() as host:
        assert isinstance(resident._lanes, ResidentLanes)
        assert type(host._lanes) is HostLanes
        for frames, options in calls:
            found, expected = (s.submit(frames, **options) for s in (resident, host))
            ours, theirs = found.result(), expected.result()
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]
            for one, other in pairs:
                assert_equal(one, other)
                assert one.has_rles == other.has_rles == ("rle" in options)
                if one.has_rles:
                    assert_rles(one)
            for name, output in expected.outputs.items():
                np.testing.assert_array_equal(
                    torch.from_dlpack(found.outputs[name]).numpy(),
                    torch.from_dlpack(output).numpy(),
                )
            np.testing.assert_array_equal(
                torch.from_dlpack(found.bitmaps()).numpy(),
                torch.from_dlpack(expected.bitmaps()).numpy(),
            )


def test_frames_are_uploaded_and_resized_by_the_kernel(
    predictors: list[Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = []
    on_host = run.on_host

    def noted(launch: Any, *arguments: Any) -> None:
        entries.append(launch.entry)
        on_host(launch, *arguments)

    monkeypatch.setattr(run, "on_host", noted)
    with predictors[0].stream() as session:
        session.submit(PICTURES[1], rle=True).result()
    ours = [entry for entry in entries if "canvas" in entry or "mask" in entry]
    assert ours == ["frame_to_canvas_rgb", "mask_edge_counts", "mask_edges"]


def test_a_frame_of_another_gpu(predictors: list[Predictor]) -> None:
    class Elsewhere:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": (4, 4, 3), "typestr": "|u1", "data": (256, False), "version": 3,
            "strides": None, "stream": None,
        }  # fmt: skip

    with predictors[0].stream() as session, pytest.raises(ImageError, match="GPU"):
        session.submit(Elsewhere())


def test_without_kernels_there_are_no_resident_lanes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(source: str, gpu: int | None) -> None:
        raise KernelUnavailableError("no CUDA compiler")

    for name, make in MEMORIES.items():
        memory = make()
        assert with_kernels(memory, name) is memory
    monkeypatch.setattr(run, "prepare_on", missing)
    with caplog.at_level(logging.WARNING, "comask"):
        for name, make in MEMORIES.items():
            assert with_kernels(make(), name) is None
            assert f"{name} takes frames on the host alone: no CUDA compiler" in caplog.text
