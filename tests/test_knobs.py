"""Settings that trade accuracy for time when a bundle runs: proposals, resolution, device."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run
from standin import live, run_on_standin
from standin_engines import assert_equal, picture, write_engines

from comask.bundle import Bundle
from comask.config import PreprocessConfig
from comask.errors import BackendUnavailableError, ConfigError, EngineError
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions, open_stages
from comask.runtime.backends.base import Stages

PICTURES = [picture(96, 128, seed) for seed in range(3)]
FEW = 20


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_few_proposals_are_the_best_ones(micro_bundle: Path, backend: str) -> None:
    with open_stages(Bundle.open(micro_bundle), backend) as stages:
        sizes = np.full((2, 2), (96, 128), np.int32)
        feeds = {"images": np.stack(PICTURES[:2]), "image_sizes": sizes}
        features = stages.stage1.run(feeds)
        for name in ("proposals", "proposal_scores"):
            features[name] = features[name][:, :FEW]
        expected = stages.stage2.run({**features, "image_sizes": sizes})
    with open_stages(Bundle.open(micro_bundle), backend, LoadOptions(proposals=FEW)) as stages:
        seconds: dict[str, float] = {}
        found = stages.run(**feeds, seconds=seconds)  # type: ignore[arg-type]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
    assert list(seconds) == ["stage1", "stage2"]
    assert min(seconds.values()) > 0


def test_resolution_keeps_the_ratio_of_its_limits(micro_bundle: Path) -> None:
    assert PreprocessConfig().resized(400).max_side == 666  # 1333 / 2, to even
    with Predictor.load(micro_bundle, "onnxruntime", short_side=64) as predictor:
        prepared = predictor.prepare(PICTURES[0])
        assert prepared.size == (64, 85)
        assert prepared.canvas.shape == (64, 96, 3)
        found = predictor(PICTURES[0])
    assert found.image_size == (96, 128)
    assert found.boxes_xyxy.max() > 64  # in pixels of the original


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"proposals": 0}, ConfigError, r"proposals: expected a whole number from 1 to \d+, got 0"),
        ({"proposals": 10**6}, ConfigError, "proposals: expected a whole number from 1 to "),
        ({"proposals": "a"}, ConfigError, r"proposals: expected a whole number .*, got 'a'"),
        ({"max_batch": 0}, ConfigError, "max_batch: expected a whole number from 1 on, got 0"),
        ({"max_batch": 2.5}, ConfigError, "max_batch: expected a whole number from 1 on, got 2.5"),
        (
            {"max_batch": True},
            ConfigError,
            "max_batch: expected a whole number from 1 on, got True",
        ),
        ({"short_side": 0}, ConfigError, "short_side: expected a whole number from 1 on, got 0"),
        ({"short_side": -5}, ConfigError, "short_side: expected a whole number from 1 on, got -5"),
        (
            {"short_side": 96.0},
            ConfigError,
            "short_side: expected a whole number from 1 on, got 96",
        ),
        ({"short_side": 10**5}, ConfigError, "short_side: expected a canvas of at most 134 megap"),
        ({"device": -1}, ConfigError, "device: expected the index of a GPU.*, got -1"),
        ({"device": "tpu"}, ConfigError, "device: expected the index of a GPU.*, got 'tpu'"),
        ({"device": "cpu", "backend": "tensorrt"}, BackendUnavailableError, "runs on a GPU, and"),
        ({"device": 7}, BackendUnavailableError, "GPU 7 was asked for"),
        ({"device": 7, "backend": "torch"}, BackendUnavailableError, "number 7 was asked for"),
        (
            {"device": 7, "backend": "auto"},
            BackendUnavailableError,
            "there is no GPU 7 here; leave the device out",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    micro_bundle: Path, settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        Predictor.load(micro_bundle, **{"backend": "onnxruntime", **settings})


def test_options_of_the_commands(micro_bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert run("shapes", data, "--count", 2, "--seed", 1).exit_code == 0
    knobs = ("--device", "cpu", "--proposals", FEW, "--short-side", 96)
    done = run("infer", micro_bundle, data / "images", "--output", tmp_path / "out",
               "--backend", "onnxruntime", "--save", "coco", *knobs)  # fmt: skip
    assert done.exit_code == 0, done.output
    images = [data / "images" / e["file_name"] for e in
              json.loads((data / "annotations" / "instances.json").read_text())["images"]]  # fmt: skip
    with Predictor.load(micro_bundle, "onnxruntime", proposals=FEW, short_side=96) as predictor:
        expected = sum(len(found) for found in predictor(list(images)))
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == expected
    done = run("eval", micro_bundle, "--data", data, "--json", tmp_path / "r.json", "--tolerance",
               100, "--no-record", *knobs)  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["proposals"], report["short_side"]) == (FEW, 96)
    refused = run("infer", micro_bundle, data, "--output", tmp_path / "out", "--device", "x")
    assert refused.exit_code == 2
    assert "expected the index of a GPU" in refused.output


# On the stand-ins.


def check_cut(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    bundle = Bundle.open(Path(folder))
    sizes = np.full((3, 2), (96, 128), np.int32)
    feeds: dict[str, Any] = {"images": np.stack(PICTURES), "image_sizes": sizes}
    with open_stages(bundle, "onnxruntime", LoadOptions(proposals=FEW)) as stages:
        expected = stages.run(**feeds)
    with open_stages(bundle, "tensorrt", LoadOptions(proposals=FEW)) as stages:
        for _ in range(2):
            seconds: dict[str, float] = {}
            found = stages.run(**feeds, seconds=seconds)
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, name)
            assert list(seconds) == ["stage1", "stage2"]
            assert seconds["stage2"] > seconds["stage1"] > 0  # it has more tasks: the copies
        # a stage alone takes what it is given
        whole = stages.stage1.run(feeds)
        assert whole["proposals"].shape[1] > FEW
        stages.stage2.run({**whole, "image_sizes": sizes})
    with Predictor.load(folder, "onnxruntime", proposals=FEW) as predictor:
        one, pair = predictor(PICTURES[0]), predictor(PICTURES[1:])
    with (
        Predictor.load(folder, "tensorrt", proposals=FEW) as predictor,
        predictor.stream() as session,
    ):
        for _ in range(4):  # the last ones as graphs
            assert_equal(session.submit(PICTURES[0]).result(), one)
            for found, other in zip(session.submit(PICTURES[1:]).result(), pair, strict=True):
                assert_equal(found, other)
    assert live() == {}


@pytest.mark.skipif(find_spec("pycuda") is None, reason="pycuda is missing: `make test`")
def test_few_proposals_on_the_stand_in(micro_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(micro_bundle, tmp_path / "bundle")
    run_on_standin(check_cut, folder)


@pytest.mark.parametrize(
    "words",
    [
        "Failed to allocate memory for requested buffer of size 3080192000",  # ONNX Runtime
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 577536000 bytes.",
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "Shapes do not fit",
    ],
)
def test_too_little_memory_is_said(words: str) -> None:
    class Full:
        def run(self, feeds: Any, keep: Any = ()) -> Any:
            raise RuntimeError(words)

    stages = Stages("torch", Full(), Full())  # type: ignore[arg-type]
    images, sizes = np.zeros((2, 64, 96, 3), np.uint8), np.zeros((2, 2), np.int32)
    kind, text = (
        (RuntimeError, words)
        if words.startswith("Shapes")
        else (EngineError, "torch: there is no memory for 2 of 64x96 pixels on cpu: take a smaller")
    )
    with pytest.raises(kind) as caught:
        stages.run(images, sizes)
    assert str(caught.value).startswith(text)
