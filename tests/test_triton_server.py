"""A real Triton server on a written repository, asked by Triton's own client.

Where it has no ONNX Runtime backend, its Python backend runs the stages' files in ONNX Runtime; the model
that clients see, and the calls between the models, are as written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run
from triton_pictures import IMAGES, assert_tells, png
from triton_server import ROOT, Installation, find_server, serving, stand_in_stages

from comask.bundle import WEIGHTS, Bundle
from comask.runtime import Predictor


@pytest.fixture(scope="module")
def installation() -> Installation:
    return find_server()


@pytest.fixture(scope="module")
def address(
    installation: Installation, micro_fp16: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Of a server with the models `comask`, and `half` in fp16."""
    folder = tmp_path_factory.mktemp("triton")
    repositories = [folder / "single", folder / "half"]
    for repository, options in zip(
        repositories, ((), ("--backend", "onnxruntime:fp16", "--model-name", "half")), strict=True
    ):
        result = run("serve", micro_fp16, "--output", repository, *options)
        assert result.exit_code == 0, result.output
        stand_in_stages(installation, repository)
    with serving(installation, repositories, folder / "log") as address:
        yield address


@pytest.fixture(scope="module")
def http(installation: Installation) -> Iterator[Any]:
    """Triton's client library, out of the server's environment."""
    sys.path.append(str(installation.packages))
    try:
        yield pytest.importorskip("tritonclient.http")
    finally:
        sys.path.remove(str(installation.packages))


@pytest.fixture(scope="module")
def client(http: Any, address: str) -> Iterator[Any]:
    with http.InferenceServerClient(address, concurrency=16) as client:
        yield client


@pytest.fixture(scope="module")
def predictor(micro_fp16: Path) -> Iterator[Predictor]:
    with Predictor.load(micro_fp16, "onnxruntime", device="cpu") as predictor:
        yield predictor


def encoded(http: Any, *images: bytes) -> list[Any]:
    tensor = http.InferInput("image", [len(images), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[image] for image in images], object))
    return [tensor]


def outputs(result: Any) -> dict[str, np.ndarray]:
    return {
        output["name"]: result.as_numpy(output["name"])
        for output in result.get_response()["outputs"]
    }


def test_results_are_the_predictors_bit_for_bit(
    http: Any, client: Any, predictor: Predictor, micro_fp16: Path
) -> None:
    inputs = encoded(http, *map(png, IMAGES))
    expected = predictor(IMAGES)
    assert min(map(len, expected)) > 0
    found = outputs(client.infer("comask", inputs))
    for row, detections in enumerate(expected):
        assert_tells(row, found, detections)
    pixels = http.InferInput("pixels", [1, *IMAGES[0].shape], "UINT8")
    pixels.set_data_from_numpy(IMAGES[0][None])
    assert_tells(0, outputs(client.infer("comask", [pixels])), expected[0])
    with Predictor.load(micro_fp16, "onnxruntime:fp16", device="cpu") as half:
        found = outputs(client.infer("half", inputs))
        for row, detections in enumerate(half(IMAGES)):
            assert_tells(row, found, detections)


def test_requests_at_once_share_batches(http: Any, client: Any, predictor: Predictor) -> None:
    def counts() -> np.ndarray:
        (model,) = client.get_inference_statistics("comask")["model_stats"]
        return np.array([int(model["inference_count"]), int(model["execution_count"])])

    expected = predictor(IMAGES)
    places = [i % len(IMAGES) for i in range(16)]
    for _ in range(10):  # beside other work requests may arrive one by one, and be run so
        before = counts()
        requests = [encoded(http, png(IMAGES[place])) for place in places]
        waiting = [client.async_infer("comask", request) for request in requests]
        for place, answer in zip(places, waiting, strict=True):
            assert_tells(0, outputs(answer.get_result()), expected[place])
        deadline = time.monotonic() + 10  # the server counts a request when it has been answered
        while (counts() - before)[0] < len(places) and time.monotonic() < deadline:
            time.sleep(0.05)
        inferences, executions = counts() - before
        assert inferences == len(places)
        if executions < len(places):
            return
    pytest.fail("10 times, 16 requests at once were run one by one")


def test_a_broken_image_fails_its_own_request(http: Any, client: Any, predictor: Predictor) -> None:
    whole = png(IMAGES[0])
    pixels = http.InferInput("pixels", [1, *IMAGES[0].shape], "UINT8")
    pixels.set_data_from_numpy(IMAGES[0][None])
    for inputs, words in [
        (encoded(http, b"no image"), "not an image of a known format"),
        ([*encoded(http, whole), pixels], "got both"),
        ([], "request has 0 inputs"),  # says Triton
    ]:
        with pytest.raises(Exception, match=words) as caught:
            client.infer("comask", inputs)
        assert caught.value.status() == "400"
    found = outputs(client.infer("comask", encoded(http, whole[:500], whole)))
    assert b"cannot be decoded" in found["error"][0, 0]
    assert_tells(1, found, predictor([IMAGES[0]])[0])


def test_a_client_can_tell_which_model_it_is(client: Any, micro_fp16: Path) -> None:
    manifest = Bundle.open(micro_fp16).manifest
    for model, precision in (("comask", "fp32"), ("half", "fp16")):
        told = client.get_model_config(model)["parameters"]
        assert told["weights_sha256"]["string_value"] == manifest.files[WEIGHTS]
        assert told["backend"]["string_value"] == f"onnxruntime:{precision}"


def test_the_example_client(
    installation: Installation, address: str, predictor: Predictor, tmp_path: Path
) -> None:
    paths = [tmp_path / "good.png", tmp_path / "broken.png", tmp_path / "none.png"]
    paths[0].write_bytes(png(IMAGES[0]))
    paths[1].write_bytes(b"no image")
    done = subprocess.run(
        [installation.python, ROOT / "examples" / "triton_client.py", *paths, "--url", address,
         "--json", tmp_path / "found.json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (expected,) = predictor([IMAGES[0]])
    best = f"{len(expected)} instances, best score {expected.scores.max():.4f}"
    assert f"{paths[0]}: {best}" in done.stdout
    assert f"{paths[1]}: " in done.stderr
    assert "not an image of a known format" in done.stderr
    assert f"{paths[2]}: No such file or directory" in done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found[str(paths[1])], found[str(paths[2])]) == (None, None)
    coco = expected.to_coco(1)
    assert [i["segmentation"] for i in found[str(paths[0])]] == [e["segmentation"] for e in coco]
    assert [i["category_id"] for i in found[str(paths[0])]] == [e["category_id"] for e in coco]
    assert [i["score"] for i in found[str(paths[0])]] == [e["score"] for e in coco]
