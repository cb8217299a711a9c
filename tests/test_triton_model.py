"""The model that a Triton server loads, on a stand-in of the server."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standin_triton as triton
from conftest import run
from triton_pictures import IMAGES, assert_tells, png

from comask.config import PreprocessConfig
from comask.preprocess import padded_shape, resized_shape
from comask.runtime import Predictor

ALL = (
    "num_detections", "boxes", "scores", "labels", "category_ids", "class_names", "rle_counts",
    "image_size", "error",
)  # fmt: skip


@pytest.fixture(scope="module")
def repository(micro_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("triton") / "repository"
    result = run("serve", micro_fp16, "--output", output, "--batch", 2)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def predictor(micro_fp16: Path) -> Iterator[Predictor]:
    with Predictor.load(micro_fp16, "onnxruntime", device="cpu", max_batch=2) as predictor:
        yield predictor


def started(repository: Path, monkeypatch: pytest.MonkeyPatch, largest: int = 10**9) -> Any:
    """The repository's `model.py`, run and initialised as the server does it."""
    triton.serve(repository, largest)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    for name in ("runtime.triton_model", "export.triton.server_model"):
        monkeypatch.delitem(sys.modules, f"comask.{name}", raising=False)
    folder = repository / "comask"
    model = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
    config = {
        "max_batch_size": 2,
        "parameters": {"backend": {"string_value": "onnxruntime:fp32"}},
    }
    model.initialize(
        {
            "model_name": "comask",
            "model_config": json.dumps(config),
            "model_repository": str(folder),
            "model_version": "1",
        }
    )
    return model


def test_a_repository_of_an_older_comask_is_served(
    repository: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its `model.py` names the module that held the model then."""
    older = Path(shutil.copytree(repository, tmp_path / "repository"))
    model = older / "comask" / "1" / "model.py"
    now, then = "comask.runtime.triton_model", "comask.export.triton.server_model"
    assert now in model.read_text()
    model.write_text(model.read_text().replace(now, then))
    (response,) = started(older, monkeypatch).execute([request(pixels=IMAGES[0][None])])
    assert_tells(0, outputs(response), predictor([IMAGES[0]])[0])


def request(*wanted: str, **inputs: np.ndarray) -> triton.InferenceRequest:
    tensors = [triton.Tensor(name, array) for name, array in inputs.items()]
    return triton.InferenceRequest(inputs=tensors, requested_output_names=list(wanted or ALL))


def encoded(*images: bytes) -> np.ndarray:
    return np.array([[image] for image in images], object)


def outputs(response: triton.InferenceResponse) -> dict[str, np.ndarray]:
    assert not response.has_error()
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def test_requests_share_batches_and_get_the_predictors_results(
    repository: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = started(repository, monkeypatch)
    asked = [
        request(image=encoded(png(IMAGES[0]), png(IMAGES[2]))),
        request(pixels=IMAGES[1][None]),
        request(image=encoded(png(IMAGES[3]))),
    ]
    first, second, third = map(outputs, model.execute(asked))
    expected = predictor([IMAGES[0], IMAGES[2], IMAGES[1], IMAGES[3]])
    assert min(map(len, expected)) > 0
    for row in (0, 1):
        assert_tells(row, first, expected[row])
    assert_tells(0, second, expected[2])
    assert_tells(0, third, expected[3])
    # the first and third image are of one canvas, though of two requests
    assert triton.batches == [2, 1, 1]


def test_only_what_is_asked_for_is_computed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = started(repository, monkeypatch)

    def refuse(*_: object) -> None:
        raise AssertionError("nobody asked for masks")

    monkeypatch.setattr("comask.structures.rles_from_mask_probs", refuse)
    (response,) = model.execute([request("scores", "error", image=encoded(png(IMAGES[0])))])
    assert set(outputs(response)) == {"scores", "error"}


def test_a_broken_image_is_its_own_error(
    repository: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = started(repository, monkeypatch)
    whole = png(IMAGES[0])
    asked = [
        request(image=encoded(whole[:500])),
        request(image=encoded(b"", whole)),
        request(image=encoded(whole)),
        request(image=encoded(whole), pixels=IMAGES[0][None]),
        request(pixels=np.zeros((1, 0, 5, 3), np.uint8)),
        request(),
    ]
    broken, half, good, both, nothing, neither = model.execute(asked)
    (expected,) = predictor([IMAGES[0]])
    assert_tells(0, outputs(good), expected)
    assert_tells(1, outputs(half), expected)
    assert b"the file is empty" in outputs(half)["error"][0, 0]
    assert outputs(half)["num_detections"][0] == 0
    for response, words in [
        (broken, "cannot be decoded"),
        (both, "got both"),
        (neither, "got neither"),
        (nothing, "[0, 5, 3]"),
    ]:
        assert response.error().code() == triton.TritonError.INVALID_ARG
        assert words in response.error().message()


def test_a_canvas_that_the_network_refuses_fails_alone(
    repository: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pixels(image: np.ndarray) -> int:
        config: PreprocessConfig = predictor.preprocess
        height, width = padded_shape(resized_shape(image.shape[:2], config), config)
        return height * width

    assert pixels(IMAGES[0]) > pixels(IMAGES[2])
    model = started(repository, monkeypatch, largest=pixels(IMAGES[2]))
    refused, good = model.execute([request(pixels=IMAGES[i][None]) for i in (0, 2)])
    assert refused.error().code() == triton.TritonError.INTERNAL
    assert refused.error().message() == "comask_stage1: unexpected shape for input 'images'"
    assert_tells(0, outputs(good), predictor([IMAGES[2]])[0])


@pytest.mark.parametrize("has_gpu", [True, False])
def test_what_is_not_finite_is_an_error_of_its_image_alone(
    repository: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr(triton, "has_gpu", has_gpu)
    model = started(repository, monkeypatch)
    white = np.full_like(IMAGES[0], 255)
    asked = [
        request(pixels=white[None]),
        request(pixels=IMAGES[0][None]),
        request(image=encoded(png(white), png(IMAGES[3]))),
    ]
    refused, good, half = model.execute(asked)
    assert triton.batches[0] == 2  # they were on their way together
    assert refused.error().code() == triton.TritonError.INTERNAL
    assert "not finite" in refused.error().message()
    assert_tells(0, outputs(good), predictor([IMAGES[0]])[0])
    assert b"not finite" in outputs(half)["error"][0, 0]
    assert outputs(half)["num_detections"][0] == 0
    assert_tells(1, outputs(half), predictor([IMAGES[3]])[0])


def test_one_stage_runs_alone(
    repository: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = started(repository, monkeypatch)
    image = predictor.prepare(IMAGES[0])
    feeds = {"images": image.canvas[None], "image_sizes": np.array([image.size], np.int32)}
    stage, reference = model._predictor.stages.stage1, predictor.stages.stage1
    assert [spec.name for spec in stage.inputs] == list(feeds)
    found, expected = stage.run(feeds), reference.run(feeds)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
